"""What is trained: the only thing that the loop knows of a prompt, a projector or a whole model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from softprompts.errors import CheckpointError, DataError
from softprompts.types import Batch

if TYPE_CHECKING:
    from softprompts.prompted import PromptedLM

__all__ = ["Objective", "PromptObjective", "StepLoss", "batch_loss", "mean_loss", "without_prompts"]

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


def batch_loss(prompted: PromptedLM, batch: Batch, reduction: Literal["token_mean", "sentence_sum"]) -> StepLoss:
    """Cross-entropy of a batch's labels.

    Both reductions sum over the label positions. ``token_mean`` divides by their number (prompt-tuning paper),
    ``sentence_sum`` by the number of rows (the official code of the prefix-tuning paper).

    Raises:
        DataError: The batch has no label to learn.
    """
    tokens = int(batch.mask_BT.sum())  # before the batch moves: counting on a GPU would wait for it
    found = prompted.label_logits(batch.to(prompted.frozen.device))
    if found.labels_M.numel() == 0:
        raise DataError("a training batch has no label: every row needs a target of at least one token")
    total = functional.cross_entropy(found.logits_MV, found.labels_M, reduction="sum")
    weight = found.labels_M.numel() if reduction == "token_mean" else batch.rows
    return StepLoss(total=total, weight=weight, tokens=tokens)


@final
class PromptObjective:
    """The prompts of a :class:`PromptedLM`, trained; the model stays as it is.

    Args:
        prompted: Frozen model and its prompts.
        reduction: How token losses become one number; see :func:`batch_loss`.
    """

    def __init__(self, prompted: PromptedLM, reduction: Literal["token_mean", "sentence_sum"] = "token_mean") -> None:
        self.prompted = prompted
        self.reduction = reduction

    def parameters(self) -> list[nn.Parameter]:
        """Parameters of all prompts that are not frozen."""
        return [parameter for parameter in self.prompted.prompts.parameters() if parameter.requires_grad]

    def loss(self, batch: Batch) -> StepLoss:
        """Loss of one batch, with gradient to the prompts."""
        return batch_loss(self.prompted, batch, self.reduction)

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


@torch.no_grad()
def mean_loss(objective: Objective[B], batches: Iterable[B]) -> float:
    """Loss over many batches, weighted as if they were one, without gradient.

    Raises:
        DataError: There is no batch.
    """
    total, weight = 0.0, 0
    for batch in batches:
        loss = objective.loss(batch)
        total += float(loss.total)
        weight += loss.weight
    if weight == 0:
        raise DataError("cannot measure a loss on no batch: the split is empty")
    return total / weight


def without_prompts(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Give the same batches with no prompt on any row: what the model does alone."""
    for batch in batches:
        yield dataclasses.replace(batch, prompt_of_row_B=torch.full_like(batch.prompt_of_row_B, -1))
