"""Events for people: a progress line in the terminal, and TensorBoard where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from softprompts.training.events import Event

__all__ = ["describe_event", "show_progress", "show_shared_progress", "to_tensorboard"]


def _columns() -> tuple[ProgressColumn, ...]:
    return (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )


@contextmanager
def show_progress(console: Console, max_steps: int, *, score: str = "loss") -> Iterator[Callable[[Event], None]]:
    """Show step, loss, learning rate, tokens per second, padding, time left and the last dev score.

    On a terminal this is one line that is redrawn; elsewhere every validation is one printed line.

    Args:
        console: Where to.
        max_steps: Updates of the whole run.
        score: The dev metric to show.

    Yields:
        The function to give to ``fit`` as ``on_event``.
    """
    with Progress(*_columns(), console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("training", total=max_steps, numbers="", start=False)
        shown = {"dev": ""}

        def on_event(event: Event) -> None:
            if event["event"] == "step":
                if not bar.tasks[task].started:
                    # A resumed run: the steps before were not made in this time.
                    bar.update(task, completed=event["step"] - 1)
                    bar.start_task(task)
                numbers = f"loss {event['loss']:.4f}  lr {event['learning_rate']:.2e}  {_speed(event)}"
                bar.update(task, completed=event["step"], numbers=numbers + shown["dev"])
                return
            line = describe_event(event)
            if line:
                console.print(line)
            if event["event"] == "validation" and event["metrics"].get(score) is not None:
                shown["dev"] = f"  dev {score} {event['metrics'][score]:.4f}"

        yield on_event


@contextmanager
def show_shared_progress(console: Console, max_steps: Mapping[str, int]) -> Iterator[Callable[[str, Event], None]]:
    """Show several runs that are trained together: updates of all of them, mean loss, speed, padding and time left.

    Args:
        console: Where to; on a terminal one line, elsewhere a printed line per validation.
        max_steps: Updates of every run, by its name.

    Yields:
        A function that takes the name of a run and its event.
    """
    with Progress(*_columns(), console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("training", total=0, numbers="")
        done, left, losses = dict[str, int](), dict[str, int](), dict[str, float]()
        width = max(map(len, max_steps), default=0)

        def on_event(name: str, event: Event) -> None:
            if event["event"] == "step":
                losses[name] = event["loss"]
                done[name] = done.get(name, 0) + 1  # in this process: a resumed run made its others before
                left[name] = max_steps[name] - event["step"]
                mean = sum(losses.values()) / len(losses)
                numbers = f"{len(losses)} prompts  mean loss {mean:.4f}  {_speed(event)}"
                made = sum(done.values())
                bar.update(task, completed=made, total=made + sum(left.values()), numbers=numbers)
                return
            if event["event"] in ("end", "diverged"):
                left[name] = 0
                losses.pop(name, None)
            line = describe_event(event)
            if line:
                console.print(f"{name:<{width}}  {line}", markup=False)

        yield on_event


def _speed(event: Event) -> str:
    padding = f"  padding {event['padding']:.0%}" if event["padding"] is not None else ""
    return f"{event['tokens_per_s']:,.0f} tokens/s{padding}"


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
    if event["event"] == "diverged":
        return f"step {event['step']:>6}  diverged: the loss is {_number(event['loss'])}"
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
