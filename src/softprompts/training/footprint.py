"""The memory that an update takes, known before it is made.

The update runs once without data (:mod:`softprompts.models.memory`): the same code, the same tensors, nothing computed.
A model whose computation depends on its own numbers (experts that are picked token by token) cannot be run so; there
the update is made for real and measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.optim import Optimizer

from softprompts.config import TrainingConfig
from softprompts.models.memory import LiveMemory, peak_bytes, weight_bytes, without_data
from softprompts.prompted import PromptedLM
from softprompts.tasks.encode import collate
from softprompts.training.batches import EncodedBatches
from softprompts.training.objective import Gradients, Objective, one_by_one
from softprompts.training.optim import build_optimizer
from softprompts.training.run import Member
from softprompts.types import Batch

__all__ = ["Footprint", "PromptedObjective", "footprint", "longest_update"]

_UPDATES = 2
"""From the second update on the optimizer's state is there beside everything else."""


class PromptedObjective(Objective[Batch], Protocol):
    """An objective that says which model and prompts it runs."""

    @property
    def prompted(self) -> PromptedLM:
        """Model and prompts."""
        ...


@dataclass(frozen=True)
class Footprint:
    """Memory in bytes at the moment of an update when most of it is in use; all parts together are the peak."""

    peak: int
    weights: int
    """Of the frozen model; in fine-tuning those of its trained copy as well."""
    prompts: int
    """Trained parameters of prompts."""
    optimizer: int
    """State of the optimizers."""
    sources: int
    """Keys and values of inputs that are kept (``model.cache_source_gib``)."""
    logits: int
    """Tensors as wide as the vocabulary."""
    activations: int
    """Everything else: what is kept for the backward pass, gradients, and what an operator needs while it runs."""
    method: Literal["predicted", "measured"] = "predicted"


def longest_update(
    streams: Sequence[EncodedBatches], configs: Sequence[TrainingConfig], *, padded: bool = False
) -> dict[int, list[Batch]]:
    """Find the longest batches that a run will meet, or the longest update of runs that share their passes.

    Args:
        streams: One per run, each with at least one row.
        configs: Of the same runs.
        padded: Whether pads are computed as well.

    Returns:
        Batches by number of the run, as :data:`~softprompts.training.objective.Gradients` takes them. A run on its own
        computes the batches of an update one after the other, so there it is the longest one alone.
    """
    plans = [_updates(stream, config) for stream, config in zip(streams, configs, strict=True)]
    longest: dict[int, list[list[int]]] = {}
    most = 0
    for update in range(max(config.max_steps for config in configs)):
        found = {number: next(plans[number]) for number, config in enumerate(configs) if update < config.max_steps}
        if len(streams) == 1:
            found = {0: [max(found[0], key=lambda rows: _size(streams[0], rows, padded))]}
        size = sum(_size(streams[number], rows, padded) for number, batches in found.items() for rows in batches)
        if size > most:
            most, longest = size, found
    return {
        number: [collate([streams[number].rows[row] for row in rows], pad_id=streams[number].pad_id) for rows in own]
        for number, own in longest.items()
    }


def _updates(stream: EncodedBatches, config: TrainingConfig) -> Iterator[list[list[int]]]:
    """Give the batches of every update, each as indices of rows."""
    batches = _batches(stream)
    while True:
        yield list(islice(batches, config.accumulation_steps))


def _batches(stream: EncodedBatches) -> Iterator[list[int]]:
    for epoch in count():
        yield from stream.indices(epoch)


def _size(stream: EncodedBatches, rows: Sequence[int], padded: bool) -> int:
    lengths = [stream.rows[row].length for row in rows]
    return max(lengths) * len(lengths) if padded else sum(lengths)


def footprint(
    runs: Sequence[Member[Batch]],
    batches: Mapping[int, Sequence[Batch]],
    *,
    gradients: Gradients[Batch] | None = None,
    others: Sequence[nn.Module] = (),
    sources: int = 0,
) -> Footprint:
    """Foretell the memory of an update; nothing is changed, except where it has to be measured.

    Args:
        runs: What is trained; the objectives are :class:`PromptedObjective`.
        batches: Of the update, by number of the run.
        gradients: Computes the gradients, as for :func:`~softprompts.training.fit_together`.
        others: Models that are in memory as well.
        sources: Bytes that kept inputs will take once all have been read.
    """
    prompted = [cast(PromptedObjective, run.objective).prompted for run in runs]
    models = list(dict.fromkeys([*others, *(one.frozen.model for one in prompted)]))
    prompts = [one.prompts for one in prompted]
    weights, trained = weight_bytes(*models), weight_bytes(*prompts)
    update = _Updates(runs, batches, gradients or one_by_one([run.objective for run in runs]))
    predicted = True
    try:
        with without_data(*models, *prompts), _sources_emptied(prompted), torch.compiler.set_stance("force_eager"):
            if sources:
                update.make(1)  # reads the inputs
            with LiveMemory(width=prompted[0].frozen.geometry.vocab_size) as live:
                state = _state_bytes(update.make(_UPDATES))
        peak, logits = live.peak, live.wide_at_peak
    except DynamicOutputShapeException:
        predicted = False
        steppers: list[Optimizer] = []
        peak = peak_bytes(lambda: steppers.extend(update.make(_UPDATES)), device=prompted[0].frozen.device)
        state, logits = _state_bytes(steppers), 0
    return Footprint(
        peak=weights + trained + sources + peak,
        weights=weights,
        prompts=trained,
        optimizer=state,
        sources=sources,
        logits=logits,
        activations=peak - state - logits,
        method="predicted" if predicted else "measured",
    )


@contextmanager
def _sources_emptied(prompted: Sequence[PromptedLM]) -> Iterator[None]:
    """Keep what is read in other caches; those that runs share stay shared."""
    before = [one.sources for one in prompted]
    fresh = {id(cache): cache.emptied() for cache in before if cache is not None}
    for one, cache in zip(prompted, before, strict=True):
        one.sources = None if cache is None else fresh[id(cache)]
    try:
        yield
    finally:
        for one, cache in zip(prompted, before, strict=True):
            one.sources = cache


@dataclass(frozen=True)
class _Updates:
    """Updates as the loop makes them."""

    runs: Sequence[Member[Batch]]
    batches: Mapping[int, Sequence[Batch]]
    gradients: Gradients[Batch]

    def make(self, count: int) -> list[Optimizer]:
        """Make some, and return the optimizers, which hold state then."""
        parameters = [run.objective.parameters() for run in self.runs]
        steppers = [build_optimizer(own, run.optimizer) for own, run in zip(parameters, self.runs, strict=True)]
        for _ in range(count):
            for stepper in steppers:
                stepper.zero_grad(set_to_none=True)
            for number, found in self.gradients(self.batches).items():
                for parameter in parameters[number]:
                    if parameter.grad is not None:
                        parameter.grad.div_(found.weight)
                torch.nn.utils.clip_grad_norm_(parameters[number], self.runs[number].config.clip_norm or math.inf)
                steppers[number].step()
        for stepper in steppers:
            stepper.zero_grad(set_to_none=True)
        return steppers


def _state_bytes(steppers: Sequence[Optimizer]) -> int:
    values = [value for stepper in steppers for state in stepper.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
