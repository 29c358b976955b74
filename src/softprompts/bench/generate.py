"""Tokens per second of generation: ours with a prompt of its own on every row, the plain model, and PEFT."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from softprompts.bench.cases import GENERATE_CASES, find_case, make_prompt
from softprompts.bench.machine import machine, shape
from softprompts.bench.measure import interleaved
from softprompts.bench.plain import separate_model
from softprompts.bench.workload import draw_rows
from softprompts.config import DecodingConfig
from softprompts.errors import ConfigError
from softprompts.inference import Engine
from softprompts.models import FrozenLM
from softprompts.prompted import PromptedLM
from softprompts.prompts import SoftPrompt
from softprompts.tasks.encode import collate
from softprompts.types import Encoded

__all__ = ["GenerateBench", "measure_generation"]


@dataclass(frozen=True)
class GenerateBench:
    """What is measured, and how often."""

    case: str = "mixed-32"
    new_tokens: int = 64
    """Tokens per row, exactly: no row may end its text earlier."""
    repeats: int = 7
    peer_rows: int = 4
    """Rows that PEFT generates per round where every row is a call of its own; its tokens per second are theirs."""
    seed: int = 0


def measure_generation(
    frozen: FrozenLM, bench: GenerateBench, *, on_round: Callable[[int], object] | None = None
) -> dict[str, Any]:
    """Measure one case in one run; ours, the plain model and the peer take turns.

    All decode greedily and exactly ``new_tokens`` per row. The plain model is transformers' own ``generate`` on the
    same weights and rows, without prompts. PEFT has one adapter per prompt and generates all rows of one prompt in one
    batch; rows with different prompts it must generate one by one.

    Args:
        frozen: The model.
        bench: What is measured.
        on_round: Called with the number of every round.

    Returns:
        The report, ready for JSON; what needs PEFT is ``None`` where it is not installed.

    Raises:
        ConfigError: There is no such case, or a number is out of range.
    """
    case = find_case(bench.case, GENERATE_CASES)
    if min(bench.new_tokens, bench.repeats, bench.peer_rows) < 1:
        raise ConfigError("--new-tokens, --repeats and --peer-rows: expected 1 or more")
    numbers = range(case.prompts)
    rows = draw_rows(case.rows, vocab_size=frozen.geometry.vocab_size, seed=bench.seed, prompts=numbers)
    prompts = [make_prompt(frozen, "prefix", case.length, seed=bench.seed + number) for number in numbers]
    engine = Engine(PromptedLM(frozen, prompts))
    decoding = DecodingConfig(max_new_tokens=bench.new_tokens, min_new_tokens=bench.new_tokens, batch_size=case.rows)
    plain = _Plain(separate_model(frozen), frozen, bench.new_tokens)
    outputs: dict[str, list[tuple[int, ...]]] = {}

    def ours(_: int) -> None:
        outputs["ours"] = [generation.ids for generation in engine.generate(rows, decoding)]

    subjects: dict[str, Callable[[int], object]] = {"ours": ours, "plain": lambda _: plain.generate(rows)}
    peer = _peer(frozen, prompts, bench.new_tokens)
    asked = rows if case.prompts == 1 else rows[: bench.peer_rows]
    if peer is not None:

        def theirs(_: int) -> None:
            calls = [asked] if case.prompts == 1 else [[row] for row in asked]
            outputs["peer"] = [ids for call in calls for ids in peer.generate(call)]

        subjects["peer"] = theirs
    spreads = interleaved(subjects, repeats=bench.repeats, device=frozen.device, on_round=on_round)
    counts = {"ours": len(rows), "plain": len(rows), "peer": len(asked)}
    speed = {name: counts[name] * bench.new_tokens / spread.median for name, spread in spreads.items()}
    return {
        "case": case.name,
        "model": frozen.name,
        "shape": shape(frozen),
        **_ratios(speed),
        "outputs_equal": _share_equal(outputs["ours"], outputs["peer"]) if peer is not None else None,
        "peer_rows": len(asked) if peer is not None else 0,
        "peer_missing": None if peer is not None else "PEFT is not installed (pip install peft)",
        "rows": case.rows,
        "prompts": case.prompts,
        "prompt_length": case.length,
        "new_tokens": bench.new_tokens,
        "repeats": bench.repeats,
        "seed": bench.seed,
        "precision": str(frozen.dtype).removeprefix("torch."),
        "spread": {name: asdict(spread) for name, spread in spreads.items()},
        **machine(frozen.device),
    }


def _ratios(speed: dict[str, float]) -> dict[str, float | None]:
    return {
        "tokens_per_s": speed["ours"],
        "plain_tokens_per_s": speed["plain"],
        "peer_tokens_per_s": speed.get("peer"),
        "ratio_plain": speed["ours"] / speed["plain"],
        "ratio_peer": speed["ours"] / speed["peer"] if "peer" in speed else None,
    }


def _share_equal(ours: Sequence[tuple[int, ...]], theirs: Sequence[tuple[int, ...]]) -> float:
    """Share of the peer's rows that are ours, token by token."""
    return sum(mine == other for mine, other in zip(ours, theirs, strict=False)) / len(theirs)


def _peer(frozen: FrozenLM, prompts: Sequence[SoftPrompt], new_tokens: int) -> _Plain | None:
    """The peer with all prompts attached, or ``None`` where PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        return None
    model = importlib.import_module("softprompts.bench.peft_peer").peft_prefixes(frozen, prompts)
    return _Plain(model, frozen, new_tokens, choose=lambda number: model.set_adapter(str(number)))


class _Plain:
    """transformers' ``generate`` on rows that all carry one prompt, or none.

    Args:
        model: With a prompt of PEFT's attached, or without.
        frozen: Names the padding.
        new_tokens: Per row.
        choose: Called with the number of the prompt before every call.
    """

    def __init__(
        self, model: Any, frozen: FrozenLM, new_tokens: int, choose: Callable[[int], object] | None = None
    ) -> None:
        self._model, self._frozen, self._new_tokens, self._choose = model, frozen, new_tokens, choose

    @torch.no_grad()
    def generate(self, rows: Sequence[Encoded]) -> list[tuple[int, ...]]:
        """Continue the inputs of all rows in one batch."""
        if self._choose is not None:
            self._choose(rows[0].prompt)
        inputs = [replace(row, ids=row.ids[: row.target_start]) for row in rows]
        batch = collate(inputs, pad_id=self._frozen.pad_id, padding_side="left", with_labels=False)
        batch = batch.to(self._frozen.device)
        ids_BS: Tensor = self._model.generate(
            input_ids=batch.ids_BT,
            attention_mask=batch.mask_BT,
            do_sample=False,
            max_new_tokens=self._new_tokens,
            min_new_tokens=self._new_tokens,
            pad_token_id=self._frozen.pad_id,
            eos_token_id=self._frozen.eos_id,
        )
        return [tuple(row) for row in ids_BS[:, batch.ids_BT.shape[1] :].tolist()]
