"""Time, operations and memory of one training step: ours, PEFT's, and the floor below both."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softprompts.bench.cases import TRAIN_CASES, TrainCase, find_case, make_prompt
from softprompts.bench.floor import floor_step, plain_step
from softprompts.bench.machine import machine, shape
from softprompts.bench.measure import Spread, flops, interleaved, relative_difference
from softprompts.bench.plain import separate_model
from softprompts.bench.steps import WAYS, OurUpdates, Peer, PeerUpdates, Way
from softprompts.bench.workload import draw_batch
from softprompts.errors import ConfigError, UnsupportedModelError
from softprompts.models import FrozenLM
from softprompts.models.memory import peak_bytes
from softprompts.prompted import PromptedLM
from softprompts.prompts import SoftPrompt
from softprompts.training import PromptObjective, SharedPasses
from softprompts.training.objective import one_by_one
from softprompts.types import Batch

__all__ = ["TrainBench", "measure_training"]

_Subjects = dict[str, Callable[[int], object]]

_EAGER = {"ours": Way(), "peer": Way()}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainBench:
    """What is measured, and how often."""

    case: str = "prompt-100"
    batch_size: int = 16
    repeats: int = 9
    """Rounds; each has a batch of its own, the same one for everybody."""
    best: bool = False
    """Let each side compute in the way that is fastest for it, instead of float32 and eager."""
    seed: int = 0


class _Setup(NamedTuple):
    """What everybody runs on."""

    frozen: FrozenLM
    case: TrainCase
    objectives: Mapping[bool, Sequence[PromptObjective]]
    """The same prompts on the model as it is, and on the compiled one (``True``) where that is measured too."""
    peer: Peer | None
    rounds: Sequence[Sequence[Batch]]
    """Per round one batch for each prompt."""


def measure_training(
    frozen: FrozenLM, bench: TrainBench, *, on_round: Callable[[int], object] | None = None
) -> dict[str, Any]:
    """Measure one case in one run.

    Ours, the peer, the floor and the plain model take turns, round after round, each round on another batch.

    Args:
        frozen: The model.
        bench: What is measured.
        on_round: Called with the number of every round.

    Returns:
        The report, ready for JSON. What needs PEFT is ``None`` where it cannot run, and ``peer_missing`` says why.

    Raises:
        ConfigError: There is no such case, or a number is out of range.
    """
    case = find_case(bench.case, TRAIN_CASES)
    if min(bench.batch_size, bench.repeats) < 1:
        raise ConfigError(f"--batch-size {bench.batch_size} and --repeats {bench.repeats}: expected 1 or more")
    setup, missing = _prepare(frozen, case, bench)
    dtype = frozen.training_dtype
    with tempfile.TemporaryDirectory() as folder:
        ways, tried = _fastest(setup, Path(folder) / "tried") if bench.best else (_EAGER, {})
        exactness = _exactness(setup, ways)
        # Compiled code is not counted, so operations are those of the eager way; counting also warms up.
        eager = {**_updates(setup, Path(folder) / "eager", _EAGER), **_references(setup, Way())}
        operations = {name: flops(partial(run, 0)) for name, run in eager.items()}
        subjects = eager
        if bench.best:
            subjects = {**_updates(setup, Path(folder) / "best", ways), **_references(setup, ways["ours"])}
        spreads = interleaved(
            subjects,
            repeats=bench.repeats,
            device=frozen.device,
            warmup=2 if bench.best else 0,
            on_round=on_round,
        )
        memory = {
            name: peak_bytes(partial(run, 0), device=frozen.device)
            for name, run in subjects.items()
            if name in ("ours", "peer")
        }
    frozen.training_dtype = dtype
    return {
        "case": case.name,
        "model": frozen.name,
        "shape": shape(frozen),
        **_ratios(spreads, operations, memory),
        **exactness,
        "peer_missing": missing,
        "batch_size": bench.batch_size,
        "repeats": bench.repeats,
        "seed": bench.seed,
        "tokens": _tokens(setup.rounds),
        "precision": "best" if bench.best else "float32",
        "ways": {side: str(way) for side, way in ways.items()},
        "tried_seconds": tried,
        "spread": {name: asdict(spread) for name, spread in spreads.items()},
        "flops": operations,
        "peak_bytes": memory,
        **machine(frozen.device),
    }


def _prepare(frozen: FrozenLM, case: TrainCase, bench: TrainBench) -> tuple[_Setup, str | None]:
    """Draw the batches, make the prompts and the peer; the second value says why there is no peer."""
    rounds = [
        [draw_batch(bench.batch_size, frozen, seed=bench.seed + 100 * number + k) for k in range(case.prompts)]
        for number in range(bench.repeats)
    ]
    prompts = [
        make_prompt(frozen, case.kind, case.length, hidden_size=case.hidden_size, seed=bench.seed + k)
        for k in range(case.prompts)
    ]
    peer, missing = _peer(frozen, prompts[0])
    models = {False: frozen, **({True: _compiled(frozen)} if bench.best else {})}
    objectives = {
        compiled: [PromptObjective(PromptedLM(model, [prompt])) for prompt in prompts]
        for compiled, model in models.items()
    }
    return _Setup(frozen, case, objectives, peer, rounds), missing


def _compiled(frozen: FrozenLM) -> FrozenLM:
    """Freeze a second model on the same weights, and compile its training pass."""
    twin = FrozenLM.from_model(separate_model(frozen), frozen.tokenizer, name=frozen.name)
    twin.compile()
    return twin


def _peer(frozen: FrozenLM, prompt: SoftPrompt) -> tuple[Peer | None, str | None]:
    """Make the peer, or say why there is none."""
    if importlib.util.find_spec("peft") is None:
        return None, "PEFT is not installed (pip install peft)"
    try:
        peer: Peer = importlib.import_module("softprompts.bench.peft_peer").PeftTrainer(frozen, prompt)
    except UnsupportedModelError as error:
        return None, str(error)
    return peer, None


def _exactness(setup: _Setup, ways: Mapping[str, Way]) -> dict[str, float | None]:
    """Compare loss and gradients at the start, where both sides hold the same values."""
    if setup.peer is None:
        return {"loss": None, "loss_difference": None, "gradient_difference": None}
    batch, device = setup.rounds[0][0], setup.frozen.device
    objective = setup.objectives[ways["ours"].compiled][0]
    for parameter in (*objective.parameters(), *setup.peer.parameters()):
        parameter.grad = None
    ways["ours"].set(objective.prompted.frozen)
    part = objective.loss(batch)
    mean = part.total / part.weight
    mean.backward()
    with ways["peer"].context(device):
        theirs = setup.peer.loss(batch, compiled=ways["peer"].compiled)
    theirs.backward()
    return {
        "loss": float(mean.detach()),
        "loss_difference": relative_difference(mean, theirs),
        "gradient_difference": relative_difference(
            _gradient([mine for mine, _ in setup.peer.pairs]), _gradient([other for _, other in setup.peer.pairs])
        ),
    }


def _gradient(parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])


def _updates(setup: _Setup, folder: Path, ways: Mapping[str, Way]) -> _Subjects:
    """Updates of both sides, by name."""
    objectives, rounds = setup.objectives[ways["ours"].compiled], setup.rounds
    apart = OurUpdates(objectives, one_by_one(objectives), folder / "apart", ways["ours"])
    subjects: _Subjects = {"ours": lambda number: apart.step(rounds[number])}
    if setup.case.prompts > 1:
        together = OurUpdates(objectives, SharedPasses(objectives).gradients, folder / "together", ways["ours"])
        subjects = {"ours": lambda number: together.step(rounds[number]), "separate": subjects["ours"]}
    if setup.peer is not None:
        theirs = PeerUpdates(setup.peer, ways["peer"])
        subjects["peer"] = lambda number: theirs.step(rounds[number])
    return subjects


def _references(setup: _Setup, way: Way) -> _Subjects:
    """The floor, and the plain model, by name."""
    model = separate_model(setup.frozen)
    prepared = {
        "floor": [[floor_step(model, batch) for batch in batches] for batches in setup.rounds],
        "plain": [[plain_step(model, batch) for batch in batches] for batches in setup.rounds],
    }
    if setup.case.kind == "embedding":
        prepared["floor_with_prompt"] = [
            [floor_step(model, batch, prompt_tokens=setup.case.length) for batch in batches] for batches in setup.rounds
        ]

    def subject(rounds: Sequence[Sequence[Callable[[], object]]]) -> Callable[[int], None]:
        def run(number: int) -> None:
            with way.context(setup.frozen.device):
                for step in rounds[number]:
                    step()

        return run

    return {name: subject(rounds) for name, rounds in prepared.items()}


def _fastest(setup: _Setup, folder: Path) -> tuple[dict[str, Way], dict[str, float]]:
    """Try every way for each side; give the fastest of each, and the seconds of all. Values are put back."""
    start = [objective.trainable_state() for objective in setup.objectives[False]]
    subjects: _Subjects = {}
    ways: dict[str, tuple[str, Way]] = {}
    for number, way in enumerate(WAYS):
        for side, run in _updates(setup, folder / str(number), {"ours": way, "peer": way}).items():
            if side == "separate":
                continue
            name = f"{side}: {way}"
            try:
                run(0)
            except RuntimeError as error:  # no compiler, or an operation without a kernel for bfloat16
                _log.warning("%s cannot run: %s", name, str(error).splitlines()[0])
                continue
            subjects[name], ways[name] = run, (side, way)
    spreads = interleaved(subjects, repeats=min(3, len(setup.rounds)), device=setup.frozen.device, warmup=2)
    seconds = {name: spread.median for name, spread in spreads.items()}
    best = dict(_EAGER)
    for name in sorted(seconds, key=lambda name: -seconds[name]):
        side, way = ways[name]
        best[side] = way
    for objective, state in zip(setup.objectives[False], start, strict=True):
        objective.load_trainable_state(state)
    if setup.peer is not None:
        setup.peer.restart()
    return best, seconds


def _ratios(spreads: dict[str, Spread], operations: dict[str, int], memory: dict[str, int]) -> dict[str, float | None]:
    """The numbers that are compared; ``None`` where the peer is missing."""
    seconds = {name: spread.median for name, spread in spreads.items()}

    def ratio(values: dict[str, Any], above: str, below: str) -> float | None:
        return values[above] / values[below] if above in values and below in values else None

    report = {
        "seconds": seconds["ours"],
        "peer_seconds": seconds.get("peer"),
        "floor_seconds": seconds["floor"],
        "floor_with_prompt_seconds": seconds.get("floor_with_prompt", seconds["floor"]),
        "plain_seconds": seconds["plain"],
        "ratio_peer": ratio(seconds, "peer", "ours"),
        "ratio_floor": ratio(seconds, "ours", "floor"),
        "ratio_floor_with_prompt": ratio(seconds, "ours", "floor_with_prompt") or ratio(seconds, "ours", "floor"),
        "flops_ratio_floor": ratio(operations, "ours", "floor"),
        "flops_ratio_floor_with_prompt": ratio(operations, "ours", "floor_with_prompt")
        or ratio(operations, "ours", "floor"),
        "flops_ratio_peer": ratio(operations, "ours", "peer"),
        "memory_ratio_peer": ratio(memory, "ours", "peer"),
    }
    if "separate" in seconds:
        report |= {
            "separate_seconds": seconds["separate"],
            "ratio_separate": ratio(seconds, "separate", "ours"),
        }
    return report


def _tokens(rounds: Sequence[Sequence[Batch]]) -> dict[str, float]:
    """Means over all batches of all rounds."""
    batches = [batch for part in rounds for batch in part]
    labels = [int((batch.labels_BT != -100).sum()) for batch in batches if batch.labels_BT is not None]
    return {
        "real": sum(batch.tokens for batch in batches) / len(batches),
        "padded": sum(batch.mask_BT.numel() for batch in batches) / len(batches),
        "labels": sum(labels) / len(batches),
    }
