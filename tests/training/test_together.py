"""Several runs in step: each one is what it would be alone, killed at any moment or not."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompts.config import InitConfig, OptimizerConfig, PromptConfig, ReparamConfig, ScheduleConfig, TrainingConfig
from softprompts.errors import CheckpointError, ConfigError, DivergedError, StorageError, TrainingInterrupted
from softprompts.models import FrozenLM
from softprompts.prompted import PromptedLM
from softprompts.prompts import build_prompt
from softprompts.training import (
    EncodedBatches,
    Member,
    PromptObjective,
    SharedPasses,
    StepLoss,
    checkpoint,
    fit,
    fit_together,
    in_order,
    mean_loss,
    one_by_one,
    read_events,
)
from softprompts.types import Encoded, Example
from training import toy

ADAM = OptimizerConfig(learning_rate=0.05)
RUNS = {
    "a": (TrainingConfig(max_steps=9, validate_every_steps=3, checkpoint_every_steps=4), ADAM),
    "b": (TrainingConfig(max_steps=40, validate_every_steps=2, patience=1, checkpoint_every_steps=50), ADAM),
    "c": (
        TrainingConfig(max_steps=6, validate_every_steps=4, accumulation_steps=2),
        OptimizerConfig(name="adafactor", learning_rate=0.3),
    ),
}
CONSTANT = ScheduleConfig(name="constant", warmup_steps=2)


class Killed(BaseException):
    """Stands for ``kill -9``."""


# --------------------------------------------------------------------------------------------------------------------
# The loop, on toys: bit for bit
# --------------------------------------------------------------------------------------------------------------------


def toys() -> dict[str, toy.ToyObjective]:
    return {name: toy.ToyObjective(noise=0.0) for name in RUNS}


def dev(objective: toy.ToyObjective) -> dict[str, float]:
    """A score that rises and falls, so that the best is not the last and patience ends a run."""
    error = objective.inputs @ objective.weight.detach() - objective.targets
    return {"loss": float((error.square().mean() - 0.8).square())}


def alone(directory: Path) -> None:
    for name, objective in toys().items():
        config, optimizer = RUNS[name]
        fit(
            objective,
            toy.batches,
            config,
            optimizer=optimizer,
            schedule=CONSTANT,
            run_dir=directory / name,
            validate=lambda objective=objective: dev(objective),
            reference_loss=0.0,
        )


def together(directory: Path, on_event: Callable[[Any], None] | None = None, resume: bool = False, objectives=None):
    objectives = objectives or toys()
    members = [
        Member(
            objective,
            toy.batches,
            RUNS[name][0],
            optimizer=RUNS[name][1],
            schedule=CONSTANT,
            run_dir=directory / name,
            name=name,
            on_event=on_event,
            reference_loss=0.0,
        )
        for name, objective in objectives.items()
    ]
    return fit_together(
        members,
        validate=lambda due: {number: dev(members[number].objective) for number in due},
        resume=resume,
    )


def logs(directory: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: toy.timeless(directory / name) for name in RUNS}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("alone")
    alone(directory)
    found = logs(directory)
    assert [found[name][-1]["reason"] for name in RUNS] == ["max_steps", "patience", "max_steps"]
    assert len({len(events) for events in found.values()}) == 3  # they end at different times
    return found


def test_runs_together_are_those_alone_to_the_bit(tmp_path: Path, unbroken: dict[str, Any]):
    objectives = toys()
    results = together(tmp_path, objectives=objectives)
    assert logs(tmp_path) == unbroken
    for name, result in zip(RUNS, results, strict=True):
        end = unbroken[name][-1]
        assert (result.reason, result.steps, result.best_step) == (end["reason"], end["step"], end["best_step"])
        assert dev(objectives[name]) == result.best_metrics


def test_killed_at_every_event_of_any_run_resumes_to_the_same(tmp_path: Path, unbroken: dict[str, Any]):
    total = sum(map(len, unbroken.values()))
    for moment in range(0, total, 3):
        seen = itertools.count()

        def strike(_event: Any, seen: Iterator[int] = seen, moment: int = moment) -> None:
            if next(seen) == moment:
                raise Killed

        with pytest.raises(Killed):
            together(tmp_path / str(moment), strike)
        together(tmp_path / str(moment), resume=True)
        assert logs(tmp_path / str(moment)) == unbroken


@pytest.mark.parametrize("files", range(4))
def test_killed_in_the_middle_of_saving_all_are_at_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: dict[str, Any], files: int
):
    # Round 4 saves all three runs (and ends b): 3 files aside, 3 put in place. Round 6 ends c and saves a and c.
    real, counted = Path.replace, itertools.count()

    def replaced(self: Path, target: Path) -> Path:
        if Path(target).name in ("last.pending.pt", "last.pt") and next(counted) == 6 + files:
            raise Killed
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replaced)
    with pytest.raises(Killed):
        together(tmp_path)
    monkeypatch.undo()
    seen: list[int] = []

    def two_steps(event: Mapping[str, Any]) -> None:
        if event["event"] == "step":
            seen.append(event["step"])
            if len(seen) == 2:
                raise Killed

    with pytest.raises(Killed):
        together(tmp_path, two_steps, resume=True)
    # Before the first file is in place both go back to the first save; afterwards both are at the second, where c ends.
    assert seen == ([5, 5] if files < 3 else [7, 8])
    together(tmp_path, resume=True)
    assert logs(tmp_path) == unbroken
    assert not list(tmp_path.rglob("*pending*"))


def test_ctrl_c_saves_all_of_them(tmp_path: Path, unbroken: dict[str, Any]):
    struck: list[bool] = []

    def strike(event: Mapping[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 3 and not struck:
            struck.append(True)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted, match=r"2 other runs.*--resume"):
        together(tmp_path, strike)
    steps = {checkpoint.load_state(tmp_path / name / "last.pt")["state"]["step"] for name in RUNS}
    assert steps == {3}
    with pytest.raises(ConfigError, match="unfinished run"):
        together(tmp_path)
    together(tmp_path, resume=True)
    assert logs(tmp_path) == unbroken


def test_one_of_them_can_go_on_alone(tmp_path: Path):
    together(tmp_path)
    config, optimizer = RUNS["a"]
    config = replace(config, max_steps=12)
    for directory, resume in ((tmp_path / "a", True), (tmp_path / "whole", False)):
        fit(
            toy.ToyObjective(noise=0.0),
            toy.batches,
            config,
            optimizer=optimizer,
            schedule=CONSTANT,
            run_dir=directory,
            resume=resume,
        )
    steps = [[e for e in toy.timeless(tmp_path / name) if e["event"] == "step"] for name in ("a", "whole")]
    assert steps[0] == steps[1]


def test_one_that_diverges_leaves_the_others_alone(tmp_path: Path, unbroken: dict[str, Any]):
    class Exploding(toy.ToyObjective):
        calls = 0

        def loss(self, batch: list[int]) -> StepLoss:
            self.calls += 1
            loss = super().loss(batch)
            return StepLoss(loss.total * (float("inf") if self.calls == 5 else 1.0), loss.weight, loss.tokens)

    objectives = toys()
    objectives["a"] = Exploding(noise=0.0)
    results = together(tmp_path, objectives=objectives)
    assert [result.reason for result in results] == ["diverged", "patience", "max_steps"]
    assert (results[0].steps, results[0].best_step) == (4, 3)
    found = logs(tmp_path)
    assert found["b"] == unbroken["b"]
    assert found["c"] == unbroken["c"]
    assert [event["event"] for event in found["a"][-2:]] == ["diverged", "end"]
    assert [result.reason for result in together(tmp_path, resume=True)] == ["diverged", "patience", "max_steps"]
    assert logs(tmp_path) == found
    everyone = {name: Exploding(noise=0.0) for name in RUNS}
    with pytest.raises(DivergedError, match="all 2 runs have diverged; lower"):
        together(tmp_path / "all", objectives={name: everyone[name] for name in ("a", "c")})


def test_seconds_are_shared_out(tmp_path: Path):
    together(tmp_path)
    steps = [next(e for e in read_events(tmp_path / name / "events.jsonl") if e["event"] == "step") for name in RUNS]
    assert [step["tokens"] for step in steps] == [12, 12, 24]
    per_token = {step["seconds"] / step["tokens"] for step in steps}
    assert max(per_token) == pytest.approx(min(per_token))
    assert steps[0]["tokens_per_s"] == pytest.approx(sum(s["tokens"] for s in steps) / sum(s["seconds"] for s in steps))


def test_two_runs_in_one_folder_are_refused(tmp_path: Path):
    member = Member(toy.ToyObjective(), toy.batches, TrainingConfig(), ADAM, CONSTANT, tmp_path)
    with pytest.raises(ConfigError, match="2 runs in 1 folders"):
        fit_together([member, member])
    with pytest.raises(ConfigError, match="at least one"):
        fit_together([])


def test_a_full_disk_leaves_every_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real, calls = torch.save, itertools.count()

    def refuse(*arguments: Any, **options: Any) -> None:
        # The first save writes three states; the second one gets as far as its second.
        if Path(arguments[1].name).name == ".last.pending.pt.tmp" and next(calls) == 4:
            raise OSError("No space left on device")
        real(*arguments, **options)

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(StorageError, match="No space left"):
        together(tmp_path)
    steps = {checkpoint.load_state(tmp_path / name / "last.pt")["state"]["step"] for name in RUNS}
    assert steps == {4}


# --------------------------------------------------------------------------------------------------------------------
# Shared forward passes, on a tiny real model
# --------------------------------------------------------------------------------------------------------------------

WORDS = ["owl", "a cat", "one very old cow", "the red hen of the farm", "pig", "dogs and dogs"]
SETTINGS: list[dict[str, Any]] = [
    {"kind": "prefix", "length": 3},
    {"kind": "embedding", "length": 7, "reparametrization": ReparamConfig(name="residual", hidden_size=8)},
    {"kind": "prefix", "length": 2, "reparametrization": ReparamConfig(name="mlp", hidden_size=8)},
    {"kind": "embedding", "length": 4},
]
TRAINING = [
    TrainingConfig(max_steps=6, batch_size=3, seed=0),
    TrainingConfig(max_steps=9, batch_size=4, seed=1, loss="sentence_sum"),
    TrainingConfig(max_steps=5, batch_size=2, seed=2, accumulation_steps=3, clip_norm=None),
    TrainingConfig(max_steps=6, batch_size=5, seed=3),
]
OPTIMIZERS = [
    OptimizerConfig(learning_rate=0.01),
    OptimizerConfig(name="adafactor", learning_rate=0.03),
    OptimizerConfig(name="sgd", learning_rate=0.05, momentum=0.5),
    OptimizerConfig(learning_rate=0.002),
]


def encoded(frozen: FrozenLM, count: int, salt: str) -> list[Encoded]:
    rows = []
    for number in range(count):
        source = f"{salt} {' '.join(WORDS[: 1 + number % 5])}"
        head = frozen.tokenize(source)
        target = [*frozen.tokenize(WORDS[(number * 7 + len(salt)) % len(WORDS)]), frozen.eos_id]
        rows.append(Encoded((*head, *target), len(head), Example(source, ""), 0))
    return rows


def members(frozen: FrozenLM, directory: Path, *, packing: bool = True) -> list[Member[Any]]:
    made = []
    for number, (settings, config, optimizer) in enumerate(zip(SETTINGS, TRAINING, OPTIMIZERS, strict=True)):
        prompt = build_prompt(
            PromptConfig(initializer=InitConfig(name="text", text="say it"), **settings), frozen, seed=config.seed
        )
        objective = PromptObjective(PromptedLM(frozen, [prompt]), config.loss)
        objective.prompted.packing = packing
        stream = EncodedBatches(
            encoded(frozen, 11 + number, "xyz"[: number % 3]), config.batch_size, frozen.pad_id, config.seed
        )
        made.append(
            Member(
                objective,
                stream,
                config,
                optimizer=optimizer,
                schedule=ScheduleConfig(name="linear"),
                run_dir=directory / str(number),
                name=str(number),
            )
        )
    return made


def tables(runs: list[Member[Any]]) -> list[torch.Tensor]:
    return [run.objective.prompted.prompts[0].table_PW for run in runs]


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("rows_per_pass", [1, 8, 100])
@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_prompts_in_shared_passes_are_those_alone(
    tiny_frozen: Callable[[str], FrozenLM], tmp_path: Path, family: str, rows_per_pass: int, packing: bool
):
    frozen = tiny_frozen(family)
    one_each = members(frozen, tmp_path / "alone", packing=packing)
    for member in one_each:
        fit_together([member])
    shared = members(frozen, tmp_path / "together", packing=packing)
    before = tables(shared)
    passes = SharedPasses([member.objective for member in shared], rows_per_pass=rows_per_pass)
    results = fit_together(shared, gradients=passes.gradients)
    assert [result.steps for result in results] == [6, 9, 5, 6]
    for number, (lonely, joined) in enumerate(zip(tables(one_each), tables(shared), strict=True)):
        moved = float((lonely - before[number]).norm())
        assert float((joined - lonely).norm()) < 1e-4 * moved
        for a, b in zip(*(toy.timeless(tmp_path / name / str(number)) for name in ("alone", "together")), strict=True):
            assert (a["event"], a["step"]) == (b["event"], b["step"])
            if a["event"] == "step":
                assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
                assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-4)
                assert (a["tokens"], a["learning_rate"]) == (b["tokens"], b["learning_rate"])
                assert (b["padding"] == 0.0) == packing or rows_per_pass == 1


def test_resumed_shared_passes_are_exact(tiny_frozen: Callable[[str], FrozenLM], tmp_path: Path):
    frozen = tiny_frozen("gpt2")

    def train(name: str, stop_at: int | None = None, resume: bool = False) -> list[torch.Tensor]:
        def strike(event: Mapping[str, Any]) -> None:
            if event["step"] == stop_at:
                raise Killed

        runs = [
            replace(run, on_event=strike, config=replace(run.config, checkpoint_every_steps=2))
            for run in members(frozen, tmp_path / name)
        ]
        passes = SharedPasses([run.objective for run in runs], rows_per_pass=8)
        fit_together(runs, gradients=passes.gradients, resume=resume)
        return tables(runs)

    whole = train("whole")
    with pytest.raises(Killed):
        train("killed", stop_at=4)
    with pytest.raises(Killed):
        train("killed", stop_at=7, resume=True)
    for a, b in zip(whole, train("killed", resume=True), strict=True):
        assert torch.equal(a, b)
    for number in range(len(SETTINGS)):
        assert toy.timeless(tmp_path / "whole" / str(number)) == toy.timeless(tmp_path / "killed" / str(number))


@pytest.mark.parametrize("rows_per_pass", [2, 64])
def test_dev_losses_in_shared_passes_are_those_alone(
    tiny_frozen: Callable[[str], FrozenLM], tmp_path: Path, rows_per_pass: int
):
    frozen = tiny_frozen("gpt2")
    runs = members(frozen, tmp_path)
    passes = SharedPasses([run.objective for run in runs], rows_per_pass=rows_per_pass)
    rows = {number: encoded(frozen, 5 + number, "abcd"[number]) for number in (3, 0, 1)}
    found = passes.mean_losses(rows)
    for number, own in rows.items():
        expected = mean_loss(runs[number].objective, in_order(own, 3, pad_id=frozen.pad_id))
        assert found[number] == pytest.approx(expected, rel=1e-5)
    assert not any(parameter.grad is not None for run in runs for parameter in run.objective.parameters())


def test_a_pass_is_filled_with_whole_batches(
    tiny_frozen: Callable[[str], FrozenLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    frozen, sizes = tiny_frozen("gpt2"), []
    runs = members(frozen, tmp_path)
    batches = {number: [next(iter(run.batches(0, 0)))] for number, run in enumerate(runs)}
    real = PromptedLM.label_losses

    def counted(self: PromptedLM, batch: Any, states: Any = None) -> Any:
        sizes.append((batch.rows, len(self.prompts)))
        return real(self, batch, states)

    monkeypatch.setattr(PromptedLM, "label_losses", counted)
    total = sum(own.rows for (own,) in batches.values())
    for rows_per_pass, passes in ((1, 4), (6, 3), (total, 1)):
        sizes.clear()
        shared = SharedPasses([run.objective for run in runs], rows_per_pass=rows_per_pass)
        sums = shared.gradients(batches)
        assert len(sizes) == passes
        assert (sum(rows for rows, _ in sizes), sum(prompts for _, prompts in sizes)) == (total, 4)
        plain = one_by_one([run.objective for run in runs])(batches)
        for number in batches:
            assert sums[number].total == pytest.approx(plain[number].total, rel=1e-5)
            assert (sums[number].weight, sums[number].tokens) == (plain[number].weight, plain[number].tokens)


def test_prompts_of_different_models_share_nothing(tiny_frozen: Callable[[str], FrozenLM], tmp_path: Path):
    first = members(tiny_frozen("gpt2"), tmp_path)[0].objective
    other = members(tiny_frozen("llama"), tmp_path)[0].objective
    with pytest.raises(ConfigError, match="on 2 models cannot share passes"):
        SharedPasses([first, other])


def test_validation_computes_the_prompt_once(
    tiny_frozen: Callable[[str], FrozenLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    frozen, calls = tiny_frozen("gpt2"), []
    objective = members(frozen, tmp_path)[1].objective
    prompt = objective.prompted.prompts[0]
    monkeypatch.setattr(prompt, "forward", lambda real=prompt.forward: calls.append(1) or real())
    rows = encoded(frozen, 9, "x")
    once = mean_loss(objective, in_order(rows, 2, pad_id=frozen.pad_id))
    assert calls == [1]
    parts = [objective.loss(batch) for batch in in_order(rows, 2, pad_id=frozen.pad_id)]
    each = sum(float(part.total.detach()) for part in parts) / sum(part.weight for part in parts)
    assert len(calls) == 6
    assert once == pytest.approx(each, rel=1e-6)


def test_a_damaged_pending_state_is_named(tmp_path: Path):
    together(tmp_path)
    (tmp_path / "a" / "last.pending.pt").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"last\.pending\.pt' is damaged"):
        together(tmp_path, resume=True)
