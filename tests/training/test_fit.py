"""The loop: accumulation, clipping, best-on-dev, early stopping, advice, and what it does when things break."""

from __future__ import annotations

import errno
import json
import logging
import math
import resource
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompts.config import OptimizerConfig, ScheduleConfig, TrainingConfig
from softprompts.errors import ConfigError, DataError, DivergedError, StorageError
from softprompts.training import Selection, StepLoss, checkpoint, fit, mean_loss, read_events
from softprompts.training import run as training_run
from training import toy

SGD = OptimizerConfig(name="sgd", learning_rate=0.05)
CONSTANT = ScheduleConfig(name="constant")


def run(directory: Path, objective: toy.ToyObjective, batches: Any, **training: Any):
    config = TrainingConfig(**{"max_steps": 3, "clip_norm": None, **training})
    return fit(objective, batches, config, optimizer=SGD, schedule=CONSTANT, run_dir=directory)


def steps(directory: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(directory / "events.jsonl") if event["event"] == "step"]


def test_accumulated_batches_of_unequal_size_equal_one_large_batch(tmp_path: Path):
    parts, whole = [[0, 1, 2, 3, 4], [5], [6, 7]], [[0, 1, 2, 3, 4, 5, 6, 7]]
    split, joined = toy.ToyObjective(noise=0.0), toy.ToyObjective(noise=0.0)
    run(tmp_path / "split", split, lambda epoch, start: parts[start:], accumulation_steps=3)
    run(tmp_path / "joined", joined, lambda epoch, start: whole[start:])
    torch.testing.assert_close(split.weight, joined.weight, rtol=1e-6, atol=1e-7)
    for a, b in zip(steps(tmp_path / "split"), steps(tmp_path / "joined"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-6)
        assert a["tokens"] == b["tokens"]


def test_first_update_is_the_formula_and_clipping_bounds_it(tmp_path: Path):
    rows = list(range(8))
    for clip in (None, 0.01):
        objective = toy.ToyObjective(noise=0.0)
        run(tmp_path / str(clip), objective, lambda epoch, start: [rows][start:], max_steps=1, clip_norm=clip)
        inputs, targets = objective.inputs[rows], objective.targets[rows]
        gradient = -2.0 * inputs.T @ targets / len(rows)
        norm = float(gradient.norm())
        assert steps(tmp_path / str(clip))[0]["gradient_norm"] == pytest.approx(norm, rel=1e-5)
        expected = -0.05 * gradient * (1.0 if clip is None else clip / norm)
        torch.testing.assert_close(objective.weight.detach(), expected, rtol=1e-3, atol=1e-7)


def test_learning_rates_in_the_events_are_those_of_the_schedule(tmp_path: Path):
    toy.train(tmp_path, optimizer=SGD, schedule=ScheduleConfig(name="linear", warmup_steps=2), max_steps=6)
    assert [event["learning_rate"] for event in steps(tmp_path)] == [
        pytest.approx(0.05 * factor) for factor in (0.0, 0.5, 1.0, 0.75, 0.5, 0.25)
    ]


def test_every_epoch_is_used_up_before_the_next(tmp_path: Path):
    asked = []

    def batches(epoch: int, start: int) -> Iterator[list[int]]:
        asked.append((epoch, start))
        return toy.batches(epoch, start)

    run(tmp_path, toy.ToyObjective(), batches, max_steps=14)
    assert asked == [(0, 0), (1, 0), (2, 0)]
    assert [event["epoch"] for event in steps(tmp_path)] == [0] * 6 + [1] * 6 + [2] * 2


def test_no_batch_is_an_error_and_not_an_endless_loop(tmp_path: Path):
    with pytest.raises(DataError, match="training split is empty"):
        run(tmp_path, toy.ToyObjective(), lambda epoch, start: [])
    with pytest.raises(DataError, match="on no batch"):
        mean_loss(toy.ToyObjective(), [])


def test_mean_loss_weighs_batches_and_leaves_no_gradient():
    objective = toy.ToyObjective(noise=0.0)
    one = mean_loss(objective, [[0, 1, 2, 3]])
    assert mean_loss(objective, [[0], [1, 2, 3]]) == pytest.approx(one)
    assert objective.weight.grad is None


# --------------------------------------------------------------------------------------------------------------------
# Validation
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("maximize", "scores", "best"),
    [
        (False, [3.0, 1.0, 1.0, 2.0], 4),
        (True, [3.0, 1.0, 4.0, 4.0], 6),
        (True, [math.nan, 1.0, math.nan, 0.5], 4),
        (False, [1.0, math.inf, 2.0, 3.0], 2),
    ],
)
def test_the_best_parameters_are_left_in_the_objective(tmp_path: Path, maximize: bool, scores: list[float], best: int):
    objective, seen, given = toy.ToyObjective(), {}, iter(scores)

    def validate() -> dict[str, float]:
        seen[2 * len(seen) + 2] = objective.weight.detach().clone()
        return {"loss": 0.0, "score": next(given)}

    result = fit(
        objective,
        toy.batches,
        TrainingConfig(max_steps=8, validate_every_steps=2),
        optimizer=SGD,
        schedule=CONSTANT,
        run_dir=tmp_path,
        validate=validate,
        selection=Selection("score", maximize=maximize),
    )
    assert result.best_step == best
    assert result.best_metrics["score"] == scores[best // 2 - 1]
    assert torch.equal(objective.weight, seen[best])
    validations = [event for event in read_events(tmp_path / "events.jsonl") if event["event"] == "validation"]
    assert [event["step"] for event in validations if event["best"]][-1] == best
    assert [event["metrics"]["score"] for event in validations] == [s if math.isfinite(s) else None for s in scores]


def test_patience_counts_validations_without_a_better_score(tmp_path: Path):
    scores = iter([5.0, 4.0, 4.0, 3.0, 3.5, 3.5, 3.5, 0.0])
    result = toy.train(
        tmp_path, validate=lambda: {"loss": next(scores)}, patience=3, validate_every_steps=1, max_steps=100
    )
    assert (result.reason, result.steps, result.best_step) == ("patience", 7, 4)


def test_without_validation_the_last_parameters_stay(tmp_path: Path):
    result = run(tmp_path, toy.ToyObjective(), toy.batches)
    assert (result.reason, result.steps, result.best_step, result.best_metrics) == ("max_steps", 3, 0, {})
    assert not (tmp_path / "best.pt").exists()


def test_time_limit_ends_with_a_validation(tmp_path: Path):
    result = toy.train(tmp_path, max_seconds=1e-9, max_steps=1000)
    assert (result.reason, result.steps, result.best_step) == ("max_seconds", 1, 1)


def test_a_selection_that_is_not_measured_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"selection is 'loss'.*did you mean 'losss'"):
        toy.train(tmp_path, validate=lambda: {"losss": 1.0})


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_steps", 0), ("accumulation_steps", 0), ("validate_every_steps", 0), ("patience", 0), ("clip_norm", 0.0)],
)
def test_settings_out_of_range_are_named(tmp_path: Path, setting: str, value: float):
    with pytest.raises(ConfigError, match=rf"training\.{setting} is {value}, expected"):
        toy.train(tmp_path, **{setting: value})


# --------------------------------------------------------------------------------------------------------------------
# Runs that go wrong
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_steps", [30, training_run.NOT_LEARNING_AFTER_STEPS + 30])
def test_a_run_that_does_not_learn_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture, max_steps: int):
    seen: list[Mapping[str, Any]] = []
    toy.train(
        tmp_path,
        optimizer=OptimizerConfig(name="sgd", learning_rate=1e-9),
        schedule=ScheduleConfig(name="constant", warmup_steps=5),
        reference_loss=1.0,
        max_steps=max_steps,
        validate_every_steps=1000,
        on_event=seen.append,
    )
    told = [event for event in seen if event["event"] == "not_learning"]
    assert [event["step"] for event in told] == [min(max_steps, training_run.NOT_LEARNING_AFTER_STEPS + 5)]
    assert told[0]["loss"] == pytest.approx(sum(e["loss"] for e in seen if e["event"] == "step") / max_steps, rel=0.2)
    assert "learning_rate (now 1e-09" in told[0]["advice"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "initializer" in caplog.text
    assert "length" in caplog.text


def test_a_run_that_learns_is_left_in_peace(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    objective = toy.ToyObjective()
    toy.train(tmp_path, objective=objective, reference_loss=mean_loss(objective, toy.batches(0, 0)), max_steps=60)
    assert "not_learning" not in (tmp_path / "events.jsonl").read_text()
    assert caplog.records == []


def test_divergence_stops_the_run_before_the_update(tmp_path: Path):
    class Exploding(toy.ToyObjective):
        calls = 0

        def loss(self, batch: list[int]) -> StepLoss:
            self.calls += 1
            loss = super().loss(batch)
            return StepLoss(loss.total * (math.inf if self.calls == 8 else 1.0), loss.weight, loss.tokens)

    objective = Exploding()
    with pytest.raises(DivergedError, match=r"at step 8 the loss is inf.*lower optimizer\.learning_rate"):
        toy.train(tmp_path, objective=objective)
    assert torch.isfinite(objective.weight).all()
    last = read_events(tmp_path / "events.jsonl")[-1]
    assert (last["event"], last["step"], last["loss"]) == ("diverged", 8, None)
    json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1], parse_constant=pytest.fail)
    toy.train(tmp_path, resume=True)
    toy.train(tmp_path / "whole")
    assert toy.timeless(tmp_path) == toy.timeless(tmp_path / "whole")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the operating system refuse every write beyond ``size`` bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("room", [0, 1, 700, 5000])
def test_a_write_that_the_system_refuses_leaves_the_older_checkpoint(tmp_path: Path, room: int):
    path = tmp_path / "last.pt"
    checkpoint.save_state({"format": 1, "step": 1, "x": torch.ones(10)}, path)
    before = path.read_bytes()
    with largest_file(room), pytest.raises(StorageError, match="older one is intact: make room"):
        checkpoint.save_state({"format": 1, "step": 2, "x": torch.ones(100_000)}, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("call", ["save", "fsync", "replace"])
@pytest.mark.parametrize("victim", ["last.pt", "best.pt"])
def test_a_full_disk_at_any_point_of_saving_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, victim: str
):
    full = OSError(errno.ENOSPC, "No space left on device")

    def refuse(*arguments: Any, **_: Any) -> None:
        raise full

    def break_disk(event: Mapping[str, Any]) -> None:
        # Step 12 saves best.pt (after validation) and last.pt.
        if event["event"] == ("step" if victim == "best.pt" else "validation") and event["step"] == 12:
            owner = {"save": torch, "fsync": checkpoint.os, "replace": Path}[call]
            monkeypatch.setattr(owner, call, refuse)

    falling = iter(range(1000, 0, -1))
    with pytest.raises(StorageError, match="No space left"):
        toy.train(tmp_path / "full", on_event=break_disk, validate=lambda: {"loss": float(next(falling))})
    monkeypatch.undo()
    assert checkpoint.load_state(tmp_path / "full" / "last.pt")["state"]["step"] == 9
    assert not list((tmp_path / "full").glob("*.tmp"))
    for directory in ("full", "whole"):
        left = iter(range(998 if directory == "full" else 1000, 0, -1))
        toy.train(tmp_path / directory, resume=True, validate=lambda left=left: {"loss": float(next(left))})
    assert toy.timeless(tmp_path / "full") == toy.timeless(tmp_path / "whole")


def test_events_that_cannot_be_written_say_so(tmp_path: Path):
    toy.train(tmp_path, max_steps=3)
    with largest_file(10), pytest.raises(StorageError, match=r"cannot write events.*last checkpoint is intact"):
        toy.train(tmp_path, max_steps=6, resume=True)
    assert checkpoint.load_state(tmp_path / "last.pt")["state"]["step"] == 3


def test_random_numbers_are_saved_whole():
    checkpoint.seed_everything(3)
    saved = checkpoint.rng_state()
    first = (toy.random.random(), toy.random.gauss(0, 1), toy.np.random.randn(3).tolist(), torch.rand(3).tolist())
    checkpoint.seed_everything(4)
    checkpoint.set_rng_state(saved)
    again = (toy.random.random(), toy.random.gauss(0, 1), toy.np.random.randn(3).tolist(), torch.rand(3).tolist())
    assert first == again
