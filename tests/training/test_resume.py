"""A run that is killed at any moment and resumed equals one that never was, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompts.config import OptimizerConfig, ScheduleConfig
from softprompts.errors import CheckpointError, ConfigError, TrainingInterrupted
from softprompts.training import checkpoint
from training import toy


class Killed(BaseException):
    """Stands for ``kill -9`` inside of this process: nothing of the loop catches it."""


def kill_at(moment: int):
    """Make an ``on_event`` that dies at the ``moment``-th event, after it is in the file."""
    seen = iter(range(10**6))

    def on_event(_event: Mapping[str, Any]) -> None:
        if next(seen) == moment:
            raise Killed

    return on_event


OPTIMIZERS = [
    OptimizerConfig(name="adamw", learning_rate=0.05, weight_decay=0.01),
    OptimizerConfig(name="adafactor", learning_rate=0.3, weight_decay=1e-5),
    OptimizerConfig(name="adafactor", learning_rate=0.3, factored=True),
    OptimizerConfig(name="sgd", learning_rate=0.02, momentum=0.9),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda config: f"{config.name}-{config.factored}")
def test_killed_at_every_event_resumes_to_the_same_run(tmp_path: Path, optimizer: OptimizerConfig):
    settings = {"optimizer": optimizer, "accumulation_steps": 2, "max_steps": 14}
    whole = toy.ToyObjective()
    result = toy.train(tmp_path / "whole", objective=whole, **settings)
    unbroken = toy.timeless(tmp_path / "whole")
    for moment in range(len(unbroken)):
        directory = tmp_path / f"killed{moment}"
        with pytest.raises(Killed):
            toy.train(directory, on_event=kill_at(moment), **settings)
        killed = toy.ToyObjective()
        resumed = toy.train(directory, objective=killed, resume=True, **settings)
        assert toy.timeless(directory) == unbroken
        assert torch.equal(killed.weight, whole.weight)
        assert (resumed.best_step, resumed.best_metrics, resumed.tokens, resumed.last_loss) == (
            (result.best_step, result.best_metrics, result.tokens, result.last_loss)
        )


def test_killed_many_times_over_resumes_to_the_same_run(tmp_path: Path):
    toy.train(tmp_path / "whole")
    for moment in (9, 7, 5, 6):
        with pytest.raises(Killed):
            toy.train(tmp_path / "killed", resume=True, on_event=kill_at(moment))
    toy.train(tmp_path / "killed", resume=True)
    assert toy.timeless(tmp_path / "killed") == toy.timeless(tmp_path / "whole")


def test_early_stopping_goes_on_where_it_was(tmp_path: Path):
    settings = {"patience": 2, "max_steps": 400, "validate_every_steps": 2, "checkpoint_every_steps": 1}
    whole = toy.train(tmp_path / "whole", **settings)
    assert whole.reason == "patience"
    assert whole.steps == whole.best_step + 2 * settings["validate_every_steps"]
    unbroken = toy.timeless(tmp_path / "whole")
    # Die after the first of the two validations that end the run: its count has to survive.
    moment = [i for i, event in enumerate(unbroken) if event["event"] == "validation"][-2]
    with pytest.raises(Killed):
        toy.train(tmp_path / "killed", on_event=kill_at(moment + 1), **settings)
    resumed = toy.train(tmp_path / "killed", resume=True, **settings)
    assert (resumed.reason, resumed.steps, resumed.best_step) == (whole.reason, whole.steps, whole.best_step)
    assert toy.timeless(tmp_path / "killed") == unbroken


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path):
    first, second = toy.ToyObjective(), toy.ToyObjective()
    result = toy.train(tmp_path, objective=first)
    before = (tmp_path / "events.jsonl").read_bytes()
    again = toy.train(tmp_path, objective=second, resume=True)
    assert again == result
    assert torch.equal(first.weight, second.weight)
    assert (tmp_path / "events.jsonl").read_bytes() == before


def test_a_finished_run_can_be_made_longer(tmp_path: Path):
    constant = ScheduleConfig(name="constant")
    toy.train(tmp_path / "long", schedule=constant, max_steps=24)
    toy.train(tmp_path / "short", schedule=constant, max_steps=12)
    result = toy.train(tmp_path / "short", schedule=constant, max_steps=24, resume=True)
    steps = [[e for e in toy.timeless(tmp_path / name) if e["event"] == "step"] for name in ("long", "short")]
    assert result.steps == 24
    assert steps[0] == steps[1]


def test_resume_without_a_checkpoint_starts_at_the_beginning(tmp_path: Path):
    toy.train(tmp_path / "resumed", resume=True)
    toy.train(tmp_path / "plain")
    assert toy.timeless(tmp_path / "resumed") == toy.timeless(tmp_path / "plain")


def test_other_settings_are_refused_by_name(tmp_path: Path):
    with pytest.raises(Killed):
        toy.train(tmp_path, on_event=kill_at(12))
    with pytest.raises(CheckpointError, match=r"optimizer\.learning_rate \(0\.05 -> 0\.1\).*training\.batch_size"):
        toy.train(tmp_path, resume=True, batch_size=99, optimizer=OptimizerConfig(learning_rate=0.1, weight_decay=0.01))
    with pytest.raises(CheckpointError, match=r"beyond training\.max_steps 2"):
        toy.train(tmp_path, resume=True, max_steps=2)


def test_an_unfinished_run_is_not_overwritten(tmp_path: Path):
    with pytest.raises(Killed):
        toy.train(tmp_path, on_event=kill_at(12))
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(ConfigError, match=r"unfinished run.*--resume"):
        toy.train(tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_finished_run_is_replaced_by_a_new_one(tmp_path: Path):
    toy.train(tmp_path)
    result = toy.train(tmp_path, seed=5, max_steps=8)
    assert result.steps == 8
    assert [event["step"] for event in toy.timeless(tmp_path)][-1] == 8


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: bytes):
    (tmp_path / "last.pt").write_bytes(damage)
    with pytest.raises(CheckpointError, match=r"last\.pt' is damaged"):
        toy.train(tmp_path, resume=True)


def test_a_checkpoint_is_never_executed(tmp_path: Path):
    class Trap:
        def __reduce__(self):
            return (Path(tmp_path / "sprung").touch, ())

    torch.save({"format": 1, "state": Trap()}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="damaged"):
        toy.train(tmp_path, resume=True)
    assert not (tmp_path / "sprung").exists()


def test_a_best_checkpoint_of_another_step_is_refused(tmp_path: Path):
    state = checkpoint.TrainState(step=9, best_step=8)
    files = checkpoint.Checkpoints(tmp_path, {})
    files.save_best(state, {"weight": torch.zeros(1)})
    state.best_step = 4
    with pytest.raises(CheckpointError, match="is of step 8, expected 4"):
        files.load_best(state)


# --------------------------------------------------------------------------------------------------------------------
# Real signals
# --------------------------------------------------------------------------------------------------------------------


def start_and_signal(directory: Path, number: int, after_step: int) -> tuple[int, str]:
    """Train in another process, send it a signal after some step, and return its exit code and its errors."""
    command = [sys.executable, toy.__file__, str(directory)]
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment) as process:
        for line in process.stdout:
            if line.split() == ["step", str(after_step)]:
                process.send_signal(number)
                break
        _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def assert_resumes_to_the_unbroken_run(directory: Path, tmp_path: Path):
    # A run of 2000 steps takes too long: both runs go on to step 60 under a schedule made for 2000.
    class Enough(BaseException):
        pass

    def stop(event: Mapping[str, Any]) -> None:
        if event["step"] == 60:
            raise Enough

    for where, resume in ((directory, True), (tmp_path / "unbroken", False)):
        with pytest.raises(Enough):
            toy.train(where, max_steps=2000, resume=resume, on_event=stop)
    assert toy.timeless(directory) == toy.timeless(tmp_path / "unbroken")


def test_kill_minus_nine(tmp_path: Path):
    code, _ = start_and_signal(tmp_path / "killed", signal.SIGKILL, after_step=29)
    assert code == -signal.SIGKILL
    assert_resumes_to_the_unbroken_run(tmp_path / "killed", tmp_path)


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path: Path):
    code, errors = start_and_signal(tmp_path / "stopped", signal.SIGINT, after_step=28)
    assert code == 1
    assert "TrainingInterrupted: training was stopped by Ctrl-C at step" in errors
    assert "--resume" in errors
    assert "once more to stop at once" in errors
    saved = checkpoint.load_state(tmp_path / "stopped" / "last.pt")["state"]["step"]
    assert saved == toy.timeless(tmp_path / "stopped")[-1]["step"] >= 28
    assert_resumes_to_the_unbroken_run(tmp_path / "stopped", tmp_path)


def test_sigterm_saves_and_handlers_are_put_back(tmp_path: Path):
    def strike(event: Mapping[str, Any]) -> None:
        if event["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match="SIGTERM at step 5 of 20"):
        toy.train(tmp_path / "stopped", on_event=strike)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    toy.train(tmp_path / "stopped", resume=True)
    toy.train(tmp_path / "whole")
    assert toy.timeless(tmp_path / "stopped") == toy.timeless(tmp_path / "whole")


def test_a_second_ctrl_c_acts_at_once(tmp_path: Path):
    def strike(event: Mapping[str, Any]) -> None:
        if event["step"] == 5:
            signal.raise_signal(signal.SIGINT)  # in this thread, at once: two pending signals of a kind become one
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        toy.train(tmp_path, on_event=strike)
    assert checkpoint.load_state(tmp_path / "last.pt")["state"]["step"] == 3
