"""What is trained: the only thing that the loop knows of a prompt, a projector or a whole model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, final, runtime_checkable

import torch
from torch import Tensor, nn

from softprompts.errors import CheckpointError, DataError
from softprompts.types import Batch, PromptStates

if TYPE_CHECKING:
    from softprompts.prompted import PromptedLM

__all__ = [
    "Gradients",
    "Objective",
    "PromptObjective",
    "StepLoss",
    "StepSum",
    "batch_loss",
    "computed_positions",
    "mean_loss",
    "one_by_one",
    "without_prompts",
]

B_contra = TypeVar("B_contra", contravariant=True)
B = TypeVar("B")


@dataclass(frozen=True)
class StepLoss:
    """The loss of one batch, as a sum and what it is to be divided by.

    The division is left to the loop: accumulated batches are divided by their total weight once, so k batches of b
    rows give the gradient of one batch of k * b rows.
    """

    total: Tensor
    """Scalar with gradient, summed over the units of ``weight``."""
    weight: int
    """Units in ``total``: label tokens, or rows."""
    tokens: int
    """Real tokens that the model read, for tokens per second."""
    positions: int = 0
    """Text positions that the model computed for them, padding included; 0 where nobody counts."""


@dataclass(frozen=True)
class StepSum:
    """What is left of the batches of one update once their gradient lies in the parameters; see :class:`StepLoss`."""

    total: float
    weight: int
    tokens: int
    positions: int = 0


Gradients = Callable[[Mapping[int, Sequence[B]]], Mapping[int, StepSum]]
"""Adds the gradient of each run's batches to its parameters: from batches by run to sums by run."""


class Objective(Protocol[B_contra]):
    """Something with parameters and a loss."""

    def parameters(self) -> list[nn.Parameter]:
        """Parameters to train, always in the same order."""
        ...

    def loss(self, batch: B_contra) -> StepLoss:
        """Loss of one batch, with gradient."""
        ...

    def trainable_state(self) -> dict[str, Tensor]:
        """Copy, on the CPU, of all that :meth:`load_trainable_state` needs."""
        ...

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put a state back.

        Raises:
            CheckpointError: It belongs to another shape of prompt or model.
        """
        ...


@runtime_checkable
class _Measured(Protocol[B_contra]):
    """An objective that can measure many batches for less than one after the other."""

    def losses(self, batches: Iterable[B_contra]) -> Iterator[StepLoss]: ...


def batch_loss(
    prompted: PromptedLM,
    batch: Batch,
    reduction: Literal["token_mean", "sentence_sum"],
    states: Sequence[PromptStates] | None = None,
    *,
    z_loss: float = 0.0,
) -> StepLoss:
    """Cross-entropy of a batch's labels.

    Both reductions sum over the label positions. ``token_mean`` divides by their number (prompt-tuning paper),
    ``sentence_sum`` by the number of rows (the official code of the prefix-tuning paper).

    Args:
        prompted: Model and prompts.
        batch: With labels.
        reduction: What the sum is divided by.
        states: Of the prompts, where they were computed before.
        z_loss: Adds so much of the logits' squared log-sum-exp to the loss of every token (training only).

    Raises:
        DataError: The batch has no label to learn.
    """
    tokens = batch.tokens  # before the batch moves: counting on a GPU would wait for it
    found = prompted.label_losses(batch.to(prompted.frozen.device), states, z_loss=z_loss)
    if found.labels_M.numel() == 0:
        raise DataError("a training batch has no label: every row needs a target of at least one token")
    total = found.losses_M.sum()
    weight = found.labels_M.numel() if reduction == "token_mean" else batch.rows
    return StepLoss(total=total, weight=weight, tokens=tokens, positions=computed_positions(prompted, batch, tokens))


def computed_positions(prompted: PromptedLM, batch: Batch, tokens: int) -> int:
    """Count the text positions that the model computes for a batch of so many real tokens.

    Packed rows hold nothing else; otherwise every column of every row is computed.
    """
    if prompted.packing and prompted.frozen.packable:
        return tokens
    return batch.mask_BT.numel() + (0 if batch.targets_BU is None else batch.targets_BU.numel())


@final
class PromptObjective:
    """The prompts of a :class:`PromptedLM`, trained; the model stays as it is.

    Args:
        prompted: Frozen model and its prompts.
        reduction: How token losses become one number; see :func:`batch_loss`.
        z_loss: Of the training loss; what is measured (:meth:`losses`) is the cross-entropy alone.
    """

    def __init__(
        self,
        prompted: PromptedLM,
        reduction: Literal["token_mean", "sentence_sum"] = "token_mean",
        *,
        z_loss: float = 0.0,
    ) -> None:
        self.prompted = prompted
        self.reduction = reduction
        self.z_loss = z_loss

    def parameters(self) -> list[nn.Parameter]:
        """Parameters of all prompts that are not frozen."""
        return [parameter for parameter in self.prompted.prompts.parameters() if parameter.requires_grad]

    def loss(self, batch: Batch) -> StepLoss:
        """Loss of one batch, with gradient to the prompts."""
        return batch_loss(self.prompted, batch, self.reduction, z_loss=self.z_loss)

    def losses(self, batches: Iterable[Batch]) -> Iterator[StepLoss]:
        """Losses of batches between which nothing is trained: the prompts are computed once for all of them."""
        states = self.prompted.states()
        for batch in batches:
            yield batch_loss(self.prompted, batch, self.reduction, states)

    def trainable_state(self) -> dict[str, Tensor]:
        """Copy of the prompts' parameters and buffers."""
        return {name: value.detach().cpu().clone() for name, value in self.prompted.prompts.state_dict().items()}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put a copy back; see :class:`Objective`."""
        try:
            self.prompted.prompts.load_state_dict(dict(state))
        except RuntimeError as error:
            raise CheckpointError(
                f"the checkpoint belongs to another prompt than the recipe's: {error}; resume with the recipe of that "
                "run, or train into another directory"
            ) from error


def one_by_one(objectives: Sequence[Objective[B]]) -> Gradients[B]:
    """Compute gradients in the plain way: each batch of each run in a pass of its own."""

    def gradients(batches: Mapping[int, Sequence[B]]) -> dict[int, StepSum]:
        return {number: _accumulated(objectives[number], own) for number, own in batches.items()}

    return gradients


def _accumulated(objective: Objective[B], batches: Iterable[B]) -> StepSum:
    total, weight, tokens, positions = 0.0, 0, 0, 0
    for batch in batches:
        part = objective.loss(batch)
        part.total.backward()
        total += float(part.total.detach())
        weight += part.weight
        tokens += part.tokens
        positions += part.positions
    return StepSum(total, weight, tokens, positions)


@torch.no_grad()
def mean_loss(objective: Objective[B], batches: Iterable[B]) -> float:
    """Loss over many batches, weighted as if they were one, without gradient.

    Raises:
        DataError: There is no batch.
    """
    total, weight = 0.0, 0
    losses = objective.losses(batches) if isinstance(objective, _Measured) else map(objective.loss, batches)
    for loss in losses:
        total += float(loss.total)
        weight += loss.weight
    if weight == 0:
        raise DataError("cannot measure a loss on no batch: the split is empty")
    return total / weight


def without_prompts(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Give the same batches with no prompt on any row: what the model does alone."""
    for batch in batches:
        yield dataclasses.replace(batch, prompt_of_row_B=torch.full_like(batch.prompt_of_row_B, -1))
