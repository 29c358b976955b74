"""A toy to train: a linear map with noise in its loss, so that lost random numbers, order or moments would show.

Run as a script it trains in a process of its own: ``python toy.py DIRECTORY`` prints a line per update and takes its
time, so that a test can kill it.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from softprompts.config import OptimizerConfig, ScheduleConfig, TrainingConfig
from softprompts.training import TIMING_FIELDS, FitResult, StepLoss, fit, read_events

ROWS = 24
BATCH = 4


class ToyObjective:
    """Fit ``x @ weight`` to a fixed map; the loss is a mean over rows."""

    def __init__(self, noise: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(ROWS, 3, generator=generator)
        self.targets = self.inputs @ torch.randn(3, 2, generator=generator)
        self.weight = nn.Parameter(torch.zeros(3, 2))
        self.noise = noise

    def parameters(self) -> list[nn.Parameter]:
        return [self.weight]

    def loss(self, batch: list[int]) -> StepLoss:
        noise = self.noise * (torch.rand(()) + random.random() + np.random.rand())
        error = self.inputs[batch] @ self.weight - self.targets[batch] + noise
        return StepLoss(error.square().sum(), weight=len(batch), tokens=3 * len(batch))

    def trainable_state(self) -> dict[str, Tensor]:
        return {"weight": self.weight.detach().clone()}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            self.weight.copy_(state["weight"])


def batches(epoch: int, start: int) -> Iterator[list[int]]:
    """Shuffled anew in every epoch, alike in every run."""
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch)).tolist()
    for first in range(start * BATCH, ROWS, BATCH):
        yield order[first : first + BATCH]


def train(
    directory: Path,
    *,
    objective: Any = None,
    optimizer: OptimizerConfig | None = None,
    schedule: ScheduleConfig | None = None,
    validate: Callable[[], Mapping[str, float]] | None = None,
    on_event: Callable[[Mapping[str, Any]], None] | None = None,
    resume: bool = False,
    reference_loss: float | None = None,
    **training: Any,
) -> FitResult:
    """Call ``fit`` on the toy with settings that use every part of the state."""
    objective = objective or ToyObjective()

    def dev() -> dict[str, float]:
        error = objective.inputs @ objective.weight.detach() - objective.targets
        # Validation draws random numbers as well, and its own noise makes early stopping happen.
        return {"loss": float(error.square().mean()) + 0.05 * random.random()}

    settings = {"max_steps": 20, "validate_every_steps": 4, "checkpoint_every_steps": 3, **training}
    return fit(
        objective,
        batches,
        TrainingConfig(**settings),
        optimizer=optimizer or OptimizerConfig(name="adamw", learning_rate=0.05, weight_decay=0.01),
        schedule=schedule or ScheduleConfig(name="cosine", warmup_steps=3),
        run_dir=directory,
        validate=validate or dev,
        on_event=on_event,
        resume=resume,
        reference_loss=reference_loss,
    )


def timeless(directory: Path) -> list[dict[str, Any]]:
    """Events of a run without the fields that differ from run to run."""
    return [
        {name: value for name, value in event.items() if name not in TIMING_FIELDS}
        for event in read_events(directory / "events.jsonl")
    ]


def say_and_wait(event: Mapping[str, Any]) -> None:
    """Tell the parent process where we are, and give it time to strike."""
    print(event["event"], event["step"], flush=True)
    time.sleep(0.02)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), max_steps=2000, on_event=say_and_wait)
