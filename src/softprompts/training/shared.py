"""Several prompts on one frozen model, trained in the same forward passes: each row carries the prompt of its own run.

A prompt's gradient comes from its own rows alone, so the sum of all losses has for every prompt the gradient that it
would have alone. The frozen model is in memory once and reads fewer, fuller batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import cast, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from softprompts.errors import ConfigError, DataError
from softprompts.prompted import LabelLosses, PromptedLM
from softprompts.prompts.base import SoftPrompt
from softprompts.tasks.encode import IGNORED_LABEL
from softprompts.training.batches import in_order
from softprompts.training.objective import PromptObjective, StepSum, computed_positions
from softprompts.types import Batch, Encoded

__all__ = ["ROWS_PER_PASS", "SharedPasses", "joined"]

ROWS_PER_PASS = 16
"""Rows of one forward pass on a CPU unless the recipe says otherwise. It is busy with a few hundred tokens, and larger
tensors leave its caches: 128 rows of 50 tokens took 10 % more time than 8 times 16."""
_ROWS_PER_PASS_ELSEWHERE = 128
"""A GPU needs more to be full."""

_FILL = {"labels_BT": IGNORED_LABEL, "targets_BU": IGNORED_LABEL}
"""What pads hold; elsewhere anything does where the mask is 0."""


@final
class SharedPasses:
    """Gradients and dev losses of several prompts, as if each had been computed alone.

    Args:
        objectives: One per run, each with one prompt, all on the same frozen model.
        rows_per_pass: Rows of one forward pass; ``None`` takes 16 on a CPU and 128 elsewhere. The batches of a pass are
            whole ones, so it is larger where a single batch is larger.

    Raises:
        ConfigError: The objectives do not have one prompt each, or not the same model.
    """

    def __init__(self, objectives: Sequence[PromptObjective], *, rows_per_pass: int | None = None) -> None:
        models = {id(objective.prompted.frozen) for objective in objectives}
        counts = [len(objective.prompted.prompts) for objective in objectives]
        if len(models) != 1 or set(counts) != {1}:
            raise ConfigError(
                f"{len(objectives)} objectives with {counts} prompts on {len(models)} models cannot share passes; "
                "expected one prompt each, all on one frozen model"
            )
        self.objectives = tuple(objectives)
        device = objectives[0].prompted.frozen.device.type
        self.rows_per_pass = rows_per_pass or (ROWS_PER_PASS if device == "cpu" else _ROWS_PER_PASS_ELSEWHERE)

    def gradients(self, batches: Mapping[int, Sequence[Batch]]) -> dict[int, StepSum]:
        """Add the gradient of each run's batches to its prompt; see :data:`~softprompts.training.objective.Gradients`.

        Args:
            batches: By number of the run, padded on the right; which prompt their rows name does not matter.

        Raises:
            DataError: A batch has no label to learn.
        """
        sums = dict.fromkeys(batches, StepSum(0.0, 0, 0))
        for parts in self._passes([(number, batch) for number, own in batches.items() for batch in own]):
            numbers = sorted({number for number, _ in parts})
            prompted = self._prompted(numbers)
            batch = joined([part for _, part in parts], [numbers.index(number) for number, _ in parts])
            z_loss = self.objectives[numbers[0]].z_loss
            found = prompted.label_losses(batch.to(prompted.frozen.device), z_loss=z_loss)
            found.losses_M.sum().backward()
            totals = _sums(found, batch, len(numbers)).tolist()
            for number, total in zip(numbers, totals, strict=True):
                sums[number] = _plus(sums[number], StepSum(total, 0, 0))
            for number, part in parts:
                sums[number] = _plus(sums[number], self._counted(number, part, batch))
        return sums

    def _passes(self, parts: Sequence[tuple[int, Batch]]) -> Iterator[list[tuple[int, Batch]]]:
        """Fill passes with whole batches: those that run in the same way, batches of similar length together."""
        ways: dict[tuple[bool, int, float], list[tuple[int, Batch]]] = {}
        for part in sorted(parts, key=lambda part: part[1].ids_BT.shape[1]):  # stable: the order is always the same
            objective = self.objectives[part[0]]
            own = objective.prompted
            ways.setdefault((own.packing, id(own.sources), objective.z_loss), []).append(part)
        for alike in ways.values():
            taken: list[tuple[int, Batch]] = []
            for part in alike:
                if taken and sum(batch.rows for _, batch in [*taken, part]) > self.rows_per_pass:
                    yield taken
                    taken = []
                taken.append(part)
            yield taken

    def _prompted(self, numbers: Sequence[int]) -> PromptedLM:
        """Attach the prompts of some runs, and no others, to the model."""
        prompts = [cast(SoftPrompt, self.objectives[number].prompted.prompts[0]) for number in numbers]
        own = self.objectives[numbers[0]].prompted
        prompted = PromptedLM(own.frozen, prompts)
        prompted.packing, prompted.sources = own.packing, own.sources
        return prompted

    def _counted(self, number: int, part: Batch, whole: Batch) -> StepSum:
        """Count what one run's batch adds to its sums in a pass."""
        objective, tokens = self.objectives[number], part.tokens
        labels_BT = part.labels_BT if part.targets_BU is None else part.targets_BU
        assert labels_BT is not None  # the pass has run
        labels = int((labels_BT != IGNORED_LABEL).sum())
        if labels == 0:
            raise DataError("a training batch has no label: every row needs a target of at least one token")
        weight = labels if objective.reduction == "token_mean" else part.rows
        real = whole.tokens
        computed = computed_positions(objective.prompted, whole, real)
        # In a padded pass every batch is as wide as the widest.
        positions = tokens if computed == real else computed // whole.rows * part.rows
        return StepSum(0.0, weight, tokens, positions)

    @torch.no_grad()
    def mean_losses(self, rows: Mapping[int, Sequence[Encoded]]) -> dict[int, float]:
        """Measure each run's loss on rows of its own, without gradient; prompts are computed once.

        Args:
            rows: By number of the run, encoded with targets.

        Returns:
            What :func:`~softprompts.training.objective.mean_loss` gives for each run alone.

        Raises:
            DataError: A run has no rows.
        """
        ways: dict[tuple[bool, int], list[int]] = {}
        for number in rows:
            own = self.objectives[number].prompted
            ways.setdefault((own.packing, id(own.sources)), []).append(number)
        means: dict[int, float] = {}
        for numbers in ways.values():
            means |= self._mean_losses(numbers, rows)
        return means

    def _mean_losses(self, numbers: Sequence[int], rows: Mapping[int, Sequence[Encoded]]) -> dict[int, float]:
        prompted = self._prompted(numbers)
        states = prompted.states()
        totals_K = torch.zeros(len(numbers), dtype=torch.float64)
        pool = [dataclasses.replace(row, prompt=place) for place, number in enumerate(numbers) for row in rows[number]]
        for batch in in_order(pool, self.rows_per_pass, pad_id=prompted.frozen.pad_id):
            found = prompted.label_losses(batch.to(prompted.frozen.device), states)
            totals_K += _sums(found, batch, len(numbers))
        means = {}
        for number, total in zip(numbers, totals_K.tolist(), strict=True):
            per_row = self.objectives[number].reduction == "sentence_sum"
            weight = sum(1 if per_row else len(row.target_ids) for row in rows[number])
            if weight == 0:
                raise DataError("cannot measure a loss on no batch: the split is empty")
            means[number] = total / weight
        return means


def joined(batches: Sequence[Batch], prompts: Sequence[int]) -> Batch:
    """Put batches below each other, padded on the right to the widest.

    Args:
        batches: Padded on the right.
        prompts: The prompt that every row of each batch carries in the result.

    Returns:
        One batch; what only some of the batches have (labels, say) is left out.
    """
    columns: dict[str, Tensor | None] = {}
    for name in (field.name for field in dataclasses.fields(Batch)):
        values = [getattr(batch, name) for batch in batches]
        columns[name] = None if any(value is None for value in values) else _below(values, _FILL.get(name, 0))
    counts = torch.tensor([batch.rows for batch in batches])
    columns["prompt_of_row_B"] = torch.tensor(prompts).repeat_interleave(counts)
    return Batch(**columns)  # type: ignore[arg-type]


def _below(values: Sequence[Tensor], fill: int) -> Tensor:
    """Put tensors ``[B]`` or ``[B, T]`` below each other."""
    if values[0].ndim == 1:
        return torch.cat(list(values))
    width = max(value.shape[1] for value in values)
    return torch.cat([pad(value, (0, width - value.shape[1]), value=fill) for value in values])


def _sums(found: LabelLosses, batch: Batch, prompts: int) -> Tensor:
    """Sum the losses of each prompt's rows, ``[prompts]`` in float64."""
    losses_M = found.losses_M.detach().double().cpu()
    owner_M = batch.prompt_of_row_B.cpu()[found.row_M.cpu()]
    return torch.zeros(prompts, dtype=torch.float64).index_add_(0, owner_M, losses_M)


def _plus(a: StepSum, b: StepSum) -> StepSum:
    return StepSum(a.total + b.total, a.weight + b.weight, a.tokens + b.tokens, a.positions + b.positions)
