"""What a training run measures on the dev split: for one run in the plain way, for several in shared passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from softprompts.cli.training_runs import PreparedRun
    from softprompts.config import DecodingConfig
    from softprompts.training import SharedPasses
    from softprompts.types import Encoded, Prediction

__all__ = ["validator"]


def validator(
    runs: Sequence[PreparedRun], passes: SharedPasses | None
) -> Callable[[Sequence[int]], dict[int, dict[str, float]]]:
    """Make the function that measures the dev splits of the runs whose turn it is.

    Args:
        runs: All runs that are trained together; those without dev rows are left out of every answer.
        passes: How several prompts share forward passes; ``None`` for a run on its own.

    Returns:
        From numbers of runs to their dev loss, and the selection metric where that is another one.
    """

    def validate(numbers: Sequence[int]) -> dict[int, dict[str, float]]:
        measured = {number: runs[number] for number in numbers if runs[number].rows.dev}
        if not measured:
            return {}
        losses = _losses(measured, passes)
        scores = _scores({number: run for number, run in measured.items() if run.rows.inputs})
        return {number: {"loss": losses[number], **scores.get(number, {})} for number in measured}

    return validate


def _losses(runs: Mapping[int, PreparedRun], passes: SharedPasses | None) -> dict[int, float]:
    from softprompts.training import in_order, mean_loss

    if passes is not None:
        return passes.mean_losses({number: run.rows.dev for number, run in runs.items()})
    losses = {}
    for number, run in runs.items():
        pad_id, batch_size = run.objective.prompted.frozen.pad_id, run.plan.config.training.batch_size
        losses[number] = mean_loss(run.objective, in_order(run.rows.dev, batch_size, pad_id=pad_id))
    return losses


def _scores(runs: Mapping[int, PreparedRun]) -> dict[int, dict[str, float]]:
    """Generate with all prompts in the same batches, and score each prompt's outputs."""
    from softprompts.evaluation.metrics import score_all

    scores = {}
    for number, predictions in _predictions(runs).items():
        metric = runs[number].plan.selection.metric
        named = tuple(str(one.example.metadata.get("group", "")) for one in predictions)
        values = score_all(
            [metric],
            [one.text for one in predictions],
            [one.example.all_references for one in predictions],
            resamples=0,
            groups=named if all(named) else None,
        )
        scores[number] = {metric: values[metric].value}
    return scores


def _predictions(runs: Mapping[int, PreparedRun]) -> dict[int, list[Prediction]]:
    from softprompts.evaluation.predict import predict
    from softprompts.inference import Engine
    from softprompts.prompted import PromptedLM
    from softprompts.prompts import SoftPrompt

    found: dict[int, list[Prediction]] = {}
    for decoding, numbers in _alike(runs):
        first = runs[numbers[0]].objective.prompted
        prompts = [cast(SoftPrompt, prompt) for number in numbers for prompt in runs[number].objective.prompted.prompts]
        engine = Engine(PromptedLM(first.frozen, prompts) if len(numbers) > 1 else first)
        rows: list[Encoded] = []
        for place, number in enumerate(numbers):
            inputs = runs[number].rows.inputs
            rows += [dataclasses.replace(row, prompt=place) for row in inputs] if len(numbers) > 1 else inputs
        predictions = iter(predict(engine, rows, decoding))
        for number in numbers:
            found[number] = [next(predictions) for _ in runs[number].rows.inputs]
    return found


def _alike(runs: Mapping[int, PreparedRun]) -> list[tuple[DecodingConfig, list[int]]]:
    """Group runs that decode alike; what is sampled depends on a row's place, so runs that sample stay alone."""
    from softprompts.config import DecodingConfig

    groups: dict[tuple[DecodingConfig, int | None], list[int]] = {}
    for number, run in runs.items():
        given = run.plan.config.evaluation.decoding
        # A recipe that says nothing about decoding leaves it to the task.
        decoding = run.plan.task.decoding if given == DecodingConfig() else given
        groups.setdefault((decoding, number if decoding.strategy == "sample" else None), []).append(number)
    return [(decoding, numbers) for (decoding, _), numbers in groups.items()]
