"""Events for people: a progress line in the terminal, and TensorBoard where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from softprompts.training.events import Event

__all__ = ["describe_event", "show_progress", "to_tensorboard"]


@contextmanager
def show_progress(console: Console, max_steps: int, *, score: str = "loss") -> Iterator[Callable[[Event], None]]:
    """Show step, loss, learning rate, tokens per second, time left and the last dev score.

    On a terminal this is one line that is redrawn; elsewhere every validation is one printed line.

    Args:
        console: Where to.
        max_steps: Updates of the whole run.
        score: The dev metric to show.

    Yields:
        The function to give to ``fit`` as ``on_event``.
    """
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("training", total=max_steps, numbers="", start=False)
        shown = {"numbers": "", "dev": ""}

        def on_event(event: Event) -> None:
            if event["event"] == "step":
                if not bar.tasks[task].started:
                    # A resumed run: the steps before were not made in this time.
                    bar.update(task, completed=event["step"] - 1)
                    bar.start_task(task)
                shown["numbers"] = (
                    f"loss {event['loss']:.4f}  lr {event['learning_rate']:.2e}  {event['tokens_per_s']:,.0f} tokens/s"
                )
                bar.update(task, completed=event["step"], numbers=shown["numbers"] + shown["dev"])
                return
            line = describe_event(event)
            if line:
                console.print(line)
            if event["event"] == "validation" and event["metrics"].get(score) is not None:
                shown["dev"] = f"  dev {score} {event['metrics'][score]:.4f}"

        yield on_event


def describe_event(event: Event) -> str:
    """Put an event other than a step into one line, or an empty one where there is nothing to say."""
    if event["event"] == "validation":
        numbers = "  ".join(f"{name} {_number(value)}" for name, value in event["metrics"].items())
        return f"step {event['step']:>6}  dev {numbers}{'  (best so far)' if event['best'] else ''}"
    if event["event"] == "not_learning":
        return (
            f"step {event['step']:>6}  not learning: the loss is {_number(event['loss'])}, not below the "
            f"{_number(event['reference_loss'])} of the model without a prompt; {event['advice']}"
        )
    return ""


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4g}"


@contextmanager
def to_tensorboard(directory: Path) -> Iterator[Callable[[Event], None]]:
    """Write the numbers of every event for TensorBoard, if it is installed; else do nothing.

    Yields:
        A function that takes every event.
    """
    if importlib.util.find_spec("tensorboard") is None:
        yield lambda event: None
        return
    # Imported here because it is optional, and slow.
    writer: Any = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(directory))

    def on_event(event: Event) -> None:
        numbers = event["metrics"] if event["event"] == "validation" else event
        group = "dev" if event["event"] == "validation" else "train"
        if event["event"] not in ("step", "validation"):
            return
        for name, value in numbers.items():
            if isinstance(value, float):
                writer.add_scalar(f"{group}/{name}", value, event["step"])

    try:
        yield on_event
    finally:
        writer.close()
