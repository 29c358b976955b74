"""The training loop: rows from a token file, one optimizer step at a time, resumable at any of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softprompts.pretraining.checkpoint import RunState
from softprompts.pretraining.optim import rate_factor
from softprompts.pretraining.pairs import Pairing
from softprompts.pretraining.recipe import LMOptimizerConfig, LMTrainingConfig

__all__ = ["LossFunction", "PairRows", "Rows", "held_out_losses", "train_step"]

LossFunction = Callable[[torch.Tensor], torch.Tensor]


class Rows:
    """Rows of ``context + 1`` tokens out of one long row, in a new random order every epoch.

    Documents follow one another in a row, separated by one end-of-text token, and are not masked from each other.

    Args:
        tokens: The corpus.
        context: T; a row holds one token more, so that every position has a target.
        seed: Of the order.
    """

    def __init__(self, tokens: NDArray[Any], context: int, seed: int) -> None:
        self.tokens, self.context, self.seed = tokens, context, seed
        self.count = (len(tokens) - 1) // context
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, index: int) -> NDArray[Any]:
        """Return the row at a position of the endless shuffled stream, ``[T + 1]``."""
        epoch, place = divmod(index, self.count)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        return self.formed(int(self._order[place]), index)

    @property
    def predicted(self) -> int:
        """Tokens per row that the loss is a mean of."""
        return self.context

    def at(self, index: int) -> NDArray[Any]:
        """Return the row at a position of the file, ``[T + 1]``."""
        start = index * self.context
        return np.asarray(self.tokens[start : start + self.context + 1]).astype(np.int64)

    def formed(self, index: int, draw: int) -> NDArray[Any]:
        """Return the row at a position of the file as the loss function takes it.

        Args:
            index: The position.
            draw: Seeds what is random in it.
        """
        return self.at(index)

    def batch(self, first: int, count: int) -> torch.Tensor:
        """Return ``count`` rows of the shuffled stream, ``[count, T + 1]``."""
        return torch.from_numpy(np.stack([self[first + i] for i in range(count)]))


class PairRows(Rows):
    """Rows made into what encoder and decoder take: ``[S + U]``, inputs and then targets.

    What is random in a pair depends on the seed and on the row's place in the endless stream alone: the same for a
    resumed run, another one in every epoch.
    """

    def __init__(self, tokens: NDArray[Any], context: int, seed: int, pairing: Pairing) -> None:
        super().__init__(tokens, context, seed)
        self.pairing = pairing

    @property
    def predicted(self) -> int:
        """Tokens of a target."""
        return self.pairing.target_length

    def formed(self, index: int, draw: int) -> NDArray[Any]:
        """Return the pair made of the row at a position of the file, ``[S + U]``."""
        row = self.at(index)[: self.context]
        # Another stream than that of the order, which is seeded by the epoch.
        return np.concatenate(self.pairing.pair(row, np.random.default_rng([self.seed, 1, draw])))


def train_step(
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    loss_function: LossFunction,
    rows: Rows,
    state: RunState,
    training: LMTrainingConfig,
    optimizer_config: LMOptimizerConfig,
    batch_rows: int,
    total_steps: int,
) -> dict[str, Any]:
    """Do one optimizer step on ``batch_rows`` rows and advance ``state``; ``tokens`` are those of the text.

    Returns:
        ``step`` (done so far), ``tokens``, ``loss`` in nats per token, ``grad_norm``, ``rate`` (share of the peak).
    """
    started = time.perf_counter()
    factor = rate_factor(training, state.step, total_steps)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
    device = next(model.parameters()).device
    batch = rows.batch(state.step * batch_rows, batch_rows).to(device)
    parts = batch.split(batch_rows // training.micro_batches)
    loss = torch.zeros((), device=device)
    for part in parts:
        part_loss = loss_function(part) / len(parts)
        part_loss.backward()
        loss += part_loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer_config.clip_norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.tokens += batch_rows * rows.context
    state.seconds += time.perf_counter() - started
    return {
        "step": state.step,
        "tokens": state.tokens,
        "loss": float(loss),
        "grad_norm": float(norm),
        "rate": factor,
    }


@torch.no_grad()
def held_out_losses(
    loss_function: LossFunction,
    held_out: dict[str, NDArray[Any]],
    rows_of: Callable[[NDArray[Any]], Rows],
    batch_rows: int,
    device: torch.device,
    max_rows: int | None = None,
) -> dict[str, tuple[float, int]]:
    """Measure the loss on held-out text, source by source.

    Args:
        loss_function: ``rows [B, ...] -> mean loss``.
        held_out: Tokens of each source.
        rows_of: Cuts tokens into rows as the loss function takes them.
        batch_rows: B.
        device: Where the model is.
        max_rows: Most rows per source; ``None``: all.

    Returns:
        ``{source: (loss in nats per token, tokens predicted)}``; sources shorter than one row are left out.
    """
    results = {}
    for name, tokens in held_out.items():
        rows = rows_of(tokens)
        count = rows.count if max_rows is None else min(rows.count, max_rows)
        total = 0.0
        for first in range(0, count, batch_rows):
            batch = np.stack([rows.formed(i, i) for i in range(first, min(first + batch_rows, count))])
            total += float(loss_function(torch.from_numpy(batch).to(device))) * len(batch)
        if count:
            results[name] = (total / count, count * rows.predicted)
    return results
