"""What a user sees of a run."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from softprompts.errors import StorageError
from softprompts.training import read_events, show_progress, to_tensorboard
from softprompts.training.events import EventLog
from training import toy


def watch(directory: Path, terminal: bool, **settings) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=160, legacy_windows=False)
    with show_progress(console, 20) as on_event:
        toy.train(directory, on_event=on_event, **settings)
    return console.file.getvalue()


def test_terminal_shows_step_loss_rate_speed_time_left_and_dev_score(tmp_path: Path):
    shown = watch(tmp_path, terminal=True)
    events = read_events(tmp_path / "events.jsonl")
    last = [event for event in events if event["event"] == "step"][-1]
    dev = [event for event in events if event["event"] == "validation"]
    for piece in ("20/20", f"loss {last['loss']:.4f}", f"lr {last['learning_rate']:.2e}", "tokens/s", "left"):
        assert piece in shown
    assert f"dev loss {dev[-2]['metrics']['loss']:.4f}" in shown


def test_elsewhere_every_validation_is_one_line(tmp_path: Path):
    lines = watch(tmp_path, terminal=False).splitlines()
    dev = [event for event in read_events(tmp_path / "events.jsonl") if event["event"] == "validation"]
    assert len(lines) == len(dev) == 5
    for line, event in zip(lines, dev, strict=True):
        assert line.startswith(f"step {event['step']:>6}  dev loss {event['metrics']['loss']:.4g}")
        assert line.endswith("(best so far)") == event["best"]


def test_a_run_that_does_not_learn_is_told_on_the_console(tmp_path: Path):
    shown = watch(tmp_path, terminal=False, reference_loss=0.0)
    assert "not learning" in shown
    assert "learning_rate" in shown


def test_tensorboard_gets_every_number(tmp_path: Path):
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensorboard's own imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        with to_tensorboard(tmp_path / "board") as on_event:
            toy.train(tmp_path / "run", on_event=on_event)
        board = EventAccumulator(str(tmp_path / "board")).Reload()
    steps = [event for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "step"]
    assert [(item.step, item.value) for item in board.Scalars("train/loss")] == [
        (event["step"], pytest.approx(event["loss"], rel=1e-6)) for event in steps
    ]
    assert [item.step for item in board.Scalars("dev/loss")] == [4, 8, 12, 16, 20]


def test_without_tensorboard_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with to_tensorboard(tmp_path / "board") as on_event:
        on_event({"event": "step", "step": 1, "loss": 1.0})
    assert not (tmp_path / "board").exists()


def test_events_are_readable_after_a_kill_in_the_middle_of_a_line(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.write("step", 1, loss=0.1)
        kept = log.sync()
    with path.open("ab") as file:
        file.write(b'{"event": "step", "st')
    assert read_events(path) == [{"event": "step", "step": 1, "loss": 0.1}]
    with EventLog(path, keep_bytes=kept) as log:
        log.write("step", 2, loss=float("nan"))
    assert read_events(path) == [{"event": "step", "step": 1, "loss": 0.1}, {"event": "step", "step": 2, "loss": None}]


def test_events_below_a_file_are_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write events"):
        EventLog(tmp_path / "file" / "events.jsonl")
