"""Transfer without labels: the target model with its prompt learns to say what the source model says with its own.

POST (Wang et al., ICML 2025, "Efficient and Privacy-Preserving Soft Prompt Transfer for LLMs", stage 3): on plain
texts, the Kullback-Leibler divergence of the target's outputs from the source's, and that of the *change* which the
prompt makes on either side, prompted minus unprompted logits::

    loss = (1 - alpha) * KL( p_S(. | prompt_S, text)  ||  p_T(. | prompt_T, text) )
         +      alpha  * KL( softmax(z_S' - z_S)      ||  softmax(z_T' - z_T) )        z': with prompt, z: without

The second term leaves out what the two models disagree about anyway. Both models must have the same vocabulary. The
source's side never changes, so it may be computed once and kept as its k most likely tokens and the rest's sum.

Shape letters: B batch, T text tokens, M compared positions, V vocabulary, k tokens kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from softprompts.errors import ConfigError, PromptMismatchError, UnsupportedModelError
from softprompts.models import FrozenLM
from softprompts.prompted import PromptedLM
from softprompts.prompts import SoftPrompt
from softprompts.tasks.encode import bucketed_batches, collate, shuffled_batches
from softprompts.types import Batch, Encoded

__all__ = [
    "Known",
    "MatchBatch",
    "MatchBatches",
    "MatchLoss",
    "Teacher",
    "TeacherOutputs",
    "divergence",
    "matching_loss",
    "refuse_unmatchable",
]

_SMALLEST = 1e-12
"""Least probability that is left for the tokens that are not kept; below it a logarithm would be no number."""


@final
@dataclass(frozen=True)
class Known:
    """Log-probabilities at M positions, of all tokens or of the likeliest ones."""

    logprobs: Tensor
    """``[M, V]``, or ``[M, k]`` where only some are kept."""
    ids_Mk: Tensor | None = None
    """Which tokens these are; ``None``: all, in order."""

    def rows(self, chosen_M: Tensor) -> Known:
        """Those of some positions."""
        return Known(self.logprobs[chosen_M], None if self.ids_Mk is None else self.ids_Mk[chosen_M])


class TeacherOutputs(NamedTuple):
    """What the source model says at M positions."""

    output: Known
    """With its prompt."""
    change: Known
    """The change that its prompt makes: ``log_softmax(z' - z)``."""


class MatchBatch(NamedTuple):
    """Texts, and what the source model says to them."""

    batch: Batch
    teacher: TeacherOutputs | None
    """``None``: to be computed."""


class MatchLoss(NamedTuple):
    """Divergences summed over the compared positions."""

    total: Tensor
    """With gradient: the weighted sum of the two below."""
    output: Tensor
    change: Tensor
    positions: int
    """M."""


def refuse_unmatchable(source: FrozenLM, target: FrozenLM, prompt: SoftPrompt) -> None:
    """Refuse what outputs cannot be compared for.

    Raises:
        PromptMismatchError: The tokenizers differ.
        UnsupportedModelError: A model has an encoder: plain text has no target for its decoder.
        ConfigError: The prompt is an infix: plain text has no border between input and output.
    """
    if source.tokenizer_fingerprint != target.tokenizer_fingerprint:
        raise PromptMismatchError(
            f"outputs of '{source.name}' and '{target.name}' cannot be compared: their tokenizers differ "
            f"({source.tokenizer_fingerprint}, {target.tokenizer_fingerprint}); take method projector or least_squares"
        )
    for frozen in (source, target):
        if frozen.pair is not None:
            raise UnsupportedModelError(
                f"'{frozen.name}' is an encoder-decoder, and texts are matched by decoder-only models; take method "
                "projector or least_squares"
            )
    if prompt.is_infix:
        raise ConfigError("an infix stands behind an input, and plain text has none; take method projector")


@torch.no_grad()
def _both(prompted: PromptedLM, batch: Batch, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Logits ``[M, V]`` with prompt 0 and without any."""
    device = prompted.frozen.device
    with_prompt = prompted.label_logits(_carrying(batch, 0).to(device)).logits_MV[:, :vocab_size]
    without = prompted.label_logits(_carrying(batch, -1).to(device)).logits_MV[:, :vocab_size]
    return with_prompt, without


def _carrying(batch: Batch, prompt: int) -> Batch:
    return dataclasses.replace(batch, prompt_of_row_B=torch.full_like(batch.prompt_of_row_B, prompt))


@final
class Teacher:
    """The source model with its prompt.

    Args:
        frozen: The source model.
        prompt: Its prompt.
        vocab_size: Tokens that both models know (a model may have rows for more than its tokenizer has).
        top_k: How many log-probabilities of a position to keep; ``None`` for all.

    Raises:
        ConfigError: ``top_k`` is out of range.
    """

    def __init__(self, frozen: FrozenLM, prompt: SoftPrompt, *, vocab_size: int, top_k: int | None = None) -> None:
        if top_k is not None and not 0 < top_k < vocab_size:
            raise ConfigError(f"match.top_k is {top_k}, expected 1 to {vocab_size - 1}, or null for all tokens")
        self.prompted = PromptedLM(frozen, [prompt])
        self.vocab_size, self.top_k = vocab_size, top_k

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherOutputs:
        """Say what the source model says at the label positions of a batch."""
        with_prompt_MV, without_MV = _both(self.prompted, batch, self.vocab_size)
        return TeacherOutputs(self._kept(with_prompt_MV), self._kept(with_prompt_MV - without_MV))

    def _kept(self, logits_MV: Tensor) -> Known:
        logprobs_MV = logits_MV.log_softmax(dim=-1)
        if self.top_k is None:
            return Known(logprobs_MV)
        return Known(*logprobs_MV.topk(self.top_k, dim=-1))


def divergence(teacher: Known, logits_MV: Tensor) -> Tensor:
    """Kullback-Leibler divergence of ``softmax(logits)`` from the teacher's probabilities, ``[M]``.

    Where the teacher kept k tokens, all others count as one outcome, on both sides: never more than the whole
    divergence, and 0 only where the k probabilities agree.
    """
    logprobs_MV = logits_MV.log_softmax(dim=-1)
    if teacher.ids_Mk is None:
        return (teacher.logprobs.exp() * (teacher.logprobs - logprobs_MV)).sum(dim=-1)
    own_Mk = logprobs_MV.gather(1, teacher.ids_Mk)
    kept_M = (teacher.logprobs.exp() * (teacher.logprobs - own_Mk)).sum(dim=-1)
    rest_M = (1 - teacher.logprobs.exp().sum(dim=-1)).clamp(min=_SMALLEST)
    own_rest_M = (1 - own_Mk.exp().sum(dim=-1)).clamp(min=_SMALLEST)
    return kept_M + rest_M * (rest_M.log() - own_rest_M.log())


def matching_loss(prompted: PromptedLM, batch: Batch, teacher: TeacherOutputs, *, alpha: float) -> MatchLoss:
    """Compare the target model with its prompt to the source model with its own.

    Args:
        prompted: The target model with its one prompt; gradients flow to that.
        batch: Texts, with labels at every position that is compared.
        teacher: What the source model says there.
        alpha: Weight of the change, 0 to 1.

    Raises:
        ConfigError: ``alpha`` is out of range.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"match.alpha is {alpha}, expected a number from 0 to 1")
    known = teacher.output
    device, frozen = prompted.frozen.device, prompted.frozen
    vocab_size = (
        known.logprobs.shape[1] if known.ids_Mk is None else min(frozen.geometry.vocab_size, len(frozen.tokenizer))
    )
    with frozen.autocast():
        logits_MV = prompted.label_logits(_carrying(batch, 0).to(device)).logits_MV[:, :vocab_size]
    output = divergence(known, logits_MV).sum()
    change = torch.zeros_like(output)
    if alpha > 0:
        with torch.no_grad():
            without_MV = prompted.label_logits(_carrying(batch, -1).to(device)).logits_MV[:, :vocab_size]
        change = divergence(teacher.change, logits_MV - without_MV).sum()
    return MatchLoss((1 - alpha) * output + alpha * change, output, change, len(known.logprobs))


@final
class MatchBatches:
    """Texts as the endless stream of batches that a training loop asks for, with the teacher's side where it is kept.

    Args:
        rows: Texts; every token from ``target_start`` on is compared.
        teacher: The source model. With ``top_k`` its outputs are computed here, once, and kept on the CPU.
        batch_size: Rows of a batch.
        pad_id: Of the target model.
        seed: Of the order.
        by_length: Rows of similar length share a batch (less padding); otherwise chance decides alone (more learned per
            step).
    """

    def __init__(
        self,
        rows: Sequence[Encoded],
        teacher: Teacher,
        *,
        batch_size: int,
        pad_id: int,
        seed: int = 0,
        by_length: bool = True,
    ) -> None:
        self.rows, self.batch_size, self.pad_id, self.seed = list(rows), batch_size, pad_id, seed
        self.by_length = by_length
        self._kept = _of_rows(self.rows, teacher, batch_size, pad_id) if teacher.top_k is not None else None

    def __call__(self, epoch: int, start: int) -> Iterator[MatchBatch]:
        """Give the batches of one epoch from number ``start`` on."""
        for indices in self.indices(epoch)[start:]:
            yield self._batch(indices)

    def indices(self, epoch: int) -> list[list[int]]:
        """Give the rows of every batch of one epoch."""
        if not self.by_length:
            return shuffled_batches(len(self.rows), self.batch_size, seed=self.seed, epoch=epoch)
        lengths = [row.length for row in self.rows]
        return bucketed_batches(lengths, self.batch_size, seed=self.seed, epoch=epoch)

    def in_order(self) -> Iterator[MatchBatch]:
        """Give every row once, always in the same batches: for measuring."""
        order = sorted(range(len(self.rows)), key=lambda index: self.rows[index].length)
        for first in range(0, len(order), self.batch_size):
            yield self._batch(order[first : first + self.batch_size])

    def _batch(self, indices: Sequence[int]) -> MatchBatch:
        batch = collate([self.rows[index] for index in indices], pad_id=self.pad_id)
        if self._kept is None:
            return MatchBatch(batch, None)
        chosen = [self._kept[index] for index in indices]
        return MatchBatch(batch, TeacherOutputs(*(_joined(side) for side in zip(*chosen, strict=True))))


def _joined(parts: Sequence[Known]) -> Known:
    ids = [part.ids_Mk for part in parts if part.ids_Mk is not None]
    return Known(torch.cat([part.logprobs for part in parts]), torch.cat(ids) if ids else None)


def _of_rows(rows: Sequence[Encoded], teacher: Teacher, batch_size: int, pad_id: int) -> list[TeacherOutputs]:
    """Run the teacher over all rows and cut its outputs by row."""
    found: dict[int, TeacherOutputs] = {}
    order = sorted(range(len(rows)), key=lambda index: rows[index].length)
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        outputs = teacher(collate([rows[index] for index in indices], pad_id=pad_id))
        position = 0
        for index in indices:  # label positions come row by row
            chosen = slice(position, position + len(rows[index].target_ids))
            found[index] = TeacherOutputs(
                *(
                    Known(k.logprobs[chosen].cpu(), k.ids_Mk[chosen].cpu() if k.ids_Mk is not None else None)
                    for k in outputs
                )
            )
            position = chosen.stop
    return [found[index] for index in range(len(rows))]
