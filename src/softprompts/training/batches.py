"""Encoded rows as the endless stream of batches that the loop asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

from softprompts.config import TrainingConfig
from softprompts.prompted import PromptedLM
from softprompts.tasks.encode import bucketed_batches, collate, shuffled_batches
from softprompts.types import Batch, Encoded

__all__ = ["EncodedBatches", "in_order", "wants_batches_by_length"]


@final
@dataclass(frozen=True)
class EncodedBatches:
    """Training batches; a function of rows, seed, epoch and start alone."""

    rows: Sequence[Encoded]
    batch_size: int
    pad_id: int
    seed: int = 0
    by_length: bool = True
    """Rows of similar length share a batch (less padding); otherwise chance decides alone (more learned per step)."""

    def indices(self, epoch: int) -> list[list[int]]:
        """Give the rows of every batch of one epoch."""
        if not self.by_length:
            return shuffled_batches(len(self.rows), self.batch_size, seed=self.seed, epoch=epoch)
        lengths = [row.length for row in self.rows]
        return bucketed_batches(lengths, self.batch_size, seed=self.seed, epoch=epoch)

    def __call__(self, epoch: int, start: int) -> Iterator[Batch]:
        """Give the batches of one epoch from number ``start`` on, padded on the right."""
        for indices in self.indices(epoch)[start:]:
            yield collate([self.rows[index] for index in indices], pad_id=self.pad_id)


def wants_batches_by_length(config: TrainingConfig, *prompted: PromptedLM) -> bool:
    """Whether rows of similar length are to share a batch (``training.batching``).

    Args:
        config: Of the run.
        prompted: All models that run the batches. Packed rows have no pads to save, and random batches teach more per
            step, so ``auto`` asks for batches by length only where one of them pads.
    """
    if config.batching == "auto":
        return not all(one.packs for one in prompted)
    return config.batching == "length"


def in_order(rows: Sequence[Encoded], batch_size: int, *, pad_id: int) -> Iterator[Batch]:
    """Give every row once, similar lengths together, always in the same batches: for measuring a loss."""
    ordered = sorted(rows, key=lambda row: row.length)
    for first in range(0, len(ordered), batch_size):
        yield collate(ordered[first : first + batch_size], pad_id=pad_id)
