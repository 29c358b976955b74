"""One update of the trained parameters: by the product's own loop, and by PEFT."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from softprompts.config import OptimizerConfig, ScheduleConfig, TrainingConfig
from softprompts.models import FrozenLM
from softprompts.training import Member, PromptObjective, build_optimizer
from softprompts.training.objective import Gradients
from softprompts.training.run import Run
from softprompts.types import Batch

__all__ = ["OPTIMIZER", "TRAINING", "WAYS", "OurUpdates", "Peer", "PeerUpdates", "Way"]

OPTIMIZER = OptimizerConfig(learning_rate=1e-3)
"""Of both sides."""
TRAINING = TrainingConfig(max_steps=1_000_000)
"""Of our loop; the peer clips its gradient to the same norm."""


@dataclass(frozen=True)
class Way:
    """How one side computes. The frozen weights and the trained parameters are float32 in every way."""

    autocast: bool = False
    """Matrix products and attention in bfloat16."""
    compiled: bool = False

    def __str__(self) -> str:
        dtype = "bfloat16 autocast" if self.autocast else "float32"
        return f"{dtype}, {'compiled' if self.compiled else 'eager'}"

    def context(self, device: torch.device) -> torch.autocast:
        """Compute what is called inside of it this way; for what is not ours."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.autocast)

    def set(self, frozen: FrozenLM) -> None:
        """Have our training steps on a model compute this way; a compiled model stays compiled."""
        frozen.training_dtype = torch.bfloat16 if self.autocast else None


WAYS = tuple(Way(autocast, compiled) for autocast in (False, True) for compiled in (False, True))
"""What is tried for each side where each may choose."""


class Peer(Protocol):
    """A peer's prompt on the same model; see :class:`softprompts.bench.peft_peer.PeftTrainer`."""

    pairs: Sequence[tuple[Tensor, Tensor]]
    """Our trained parameters, each with the peer's."""

    def restart(self) -> None:
        """Take our parameters' values again."""
        ...

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        ...

    def loss(self, batch: Batch, *, compiled: bool = False) -> Tensor:
        """Mean over label tokens, with gradient."""
        ...


class OurUpdates:
    """The product's own updates, as its loop makes them: gradient, clipping, optimizer."""

    def __init__(
        self, objectives: Sequence[PromptObjective], gradients: Gradients[Batch], folder: Path, way: Way
    ) -> None:
        self._batches: Sequence[Batch] = ()
        self._gradients, self._way = gradients, way
        self._frozen = objectives[0].prompted.frozen
        self._runs = []
        for number, objective in enumerate(objectives):
            member = Member(
                objective,
                self._source(number),
                TRAINING,
                optimizer=OPTIMIZER,
                schedule=ScheduleConfig(name="constant"),
                run_dir=folder / str(number),
            )
            run = Run(member)
            run.start(resume=False)
            self._runs.append(run)

    def _source(self, number: int) -> Callable[[int, int], Iterable[Batch]]:
        def batches(epoch: int, start: int) -> Iterable[Batch]:
            while True:
                yield self._batches[number]

        return batches

    def step(self, batches: Sequence[Batch]) -> None:
        """Make one update of every prompt, each on its own batch."""
        self._batches = batches
        drawn = {number: run.draw() for number, run in enumerate(self._runs)}
        self._way.set(self._frozen)
        sums = self._gradients(drawn)
        for number, run in enumerate(self._runs):
            run.update(sums[number])


class PeerUpdates:
    """PEFT's updates, with the same optimizer and the same clipping."""

    def __init__(self, peer: Peer, way: Way) -> None:
        self._peer, self._way = peer, way
        self._parameters = peer.parameters()
        self._optimizer = build_optimizer(self._parameters, OPTIMIZER)

    def step(self, batches: Sequence[Batch]) -> None:
        """Make one update per batch."""
        for batch in batches:
            self._optimizer.zero_grad(set_to_none=True)
            with self._way.context(batch.ids_BT.device):
                loss = self._peer.loss(batch, compiled=self._way.compiled)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._parameters, TRAINING.clip_norm or math.inf)
            self._optimizer.step()
