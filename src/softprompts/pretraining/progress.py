"""What a run says while it trains: a progress bar or log lines, an event file, the loss curve."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

if TYPE_CHECKING:
    from softprompts.pretraining.pretrain import Run

__all__ = ["Progress", "plot_losses"]

_LINE_EVERY_S = 30.0


class Progress:
    """Collect events of a run: every ``output.log_every_steps`` one goes to the history and to ``log.jsonl``.

    On a terminal a bar shows tokens/s and the time left; elsewhere a line is reported every half minute.

    Args:
        run: Whose state and recipe are read.
        report: Told a line at a time.
    """

    def __init__(self, run: Run, report: Callable[[str], None]) -> None:
        self.run, self.report = run, report
        self._losses: list[float] = []
        self._since = (time.monotonic(), run.state.tokens)
        self._last_line = 0.0
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        # Written anew: after a crash the file may hold steps that the checkpoint does not, and they will be done again.
        self._log = (self.run.folder / "log.jsonl").open("w", encoding="utf-8")
        self._log.writelines(json.dumps(event) + "\n" for event in self.run.state.history)
        if sys.stderr.isatty():
            self._bar = RichProgress(
                TextColumn("pretrain"), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn()
            )
            self._task = self._bar.add_task("", total=self.run.total_steps, completed=self.run.state.step, text="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()
        if self._bar is not None:
            self._bar.stop()

    def step(self, event: dict[str, Any]) -> None:
        """Take the event of one step."""
        self._losses.append(event["loss"])
        if event["step"] % self.run.recipe.output.log_every_steps and event["step"] != self.run.total_steps:
            return
        now, tokens = time.monotonic(), self.run.state.tokens
        speed = (tokens - self._since[1]) / max(1e-9, now - self._since[0])
        event = event | {"loss": sum(self._losses) / len(self._losses), "tokens_per_s": speed}
        self._since, self._losses = (now, tokens), []
        self._write(event)
        left = (self.run.total_steps * tokens / event["step"] - tokens) / max(1.0, speed)
        text = f"loss {event['loss']:.3f}  {tokens / 1e6:.2f} M tokens  {speed:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=event["step"], text=text)
        elif now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            self.report(f"step {event['step']}/{self.run.total_steps}  {text}  {left / 60:.1f} min left")

    def held_out(self, losses: dict[str, dict[str, float]]) -> None:
        """Take a measurement of held-out losses."""
        short = {name: value["loss"] for name, value in losses.items()}
        self._write({"step": self.run.state.step, "tokens": self.run.state.tokens, "held_out": short})
        # Time spent measuring is not training time.
        self._since = (time.monotonic(), self.run.state.tokens)
        self.report("held out: " + "  ".join(f"{name} {loss:.3f}" for name, loss in short.items()))

    def _write(self, event: dict[str, Any]) -> None:
        self.run.state.history.append(event)
        self._log.write(json.dumps(event) + "\n")
        self._log.flush()


def plot_losses(history: list[dict[str, Any]], path: Path) -> None:
    """Draw training and held-out loss over tokens as a PNG."""
    figure = Figure(figsize=(8, 4.5), dpi=110)
    axes = figure.subplots()
    steps = [event for event in history if "loss" in event]
    measured = [event for event in history if "held_out" in event]
    axes.plot([e["tokens"] / 1e6 for e in steps], [e["loss"] for e in steps], lw=0.8, label="training")
    for name in measured[-1]["held_out"] if measured else ():
        points = [(e["tokens"] / 1e6, e["held_out"][name]) for e in measured if name in e["held_out"]]
        style = {"lw": 2.0, "color": "black"} if name == "all" else {"lw": 0.8, "ls": "--"}
        axes.plot(*zip(*points, strict=True), marker=".", label=f"held out: {name}", **style)  # type: ignore[arg-type]
    axes.set_xlabel("tokens (millions)")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, format="png")
