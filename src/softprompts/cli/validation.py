"""What a training run measures on the dev split: for one run in the plain way, for several in shared passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from softprompts.cli.training_runs import PreparedRun
    from softprompts.config import DecodingConfig
    from softprompts.inference import Engine
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
        From numbers of runs to their dev loss and, where that does not select, the metrics that do.
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
    """Predict with all prompts in the same batches, and score each prompt's outputs."""
    from softprompts.cli.training_runs import MEAN
    from softprompts.evaluation.classification import RANKED
    from softprompts.evaluation.metrics import score_all

    ways: dict[str, dict[int, list[Prediction]]] = {}
    for prefix, predict in (("", _generated), (RANKED, _ranked)):
        asked = {
            number: run
            for number, run in runs.items()
            if any(name.startswith(RANKED) == bool(prefix) for name in run.plan.measured)
        }
        ways[prefix] = predict(asked)
    scores: dict[int, dict[str, float]] = {number: {} for number in runs}
    for number, run in runs.items():
        plan, own = run.plan, scores[number]
        for name in plan.measured:
            plain = name.removeprefix(RANKED)
            predictions = ways[name.removesuffix(plain)][number]
            groups = tuple(str(one.example.metadata.get("group", "")) for one in predictions)
            value = score_all(
                [plain],
                [one.text for one in predictions],
                [one.example.all_references for one in predictions],
                resamples=0,
                groups=groups if all(groups) else None,
            )
            own[name] = value[plain].value
        if plan.selection.metric == MEAN:
            own[MEAN] = sum(own.values()) / len(plan.measured)
    return scores


def _generated(runs: Mapping[int, PreparedRun]) -> dict[int, list[Prediction]]:
    """What the prompts of some runs make of their dev inputs."""
    from softprompts.evaluation.predict import predict

    found: dict[int, list[Prediction]] = {}
    for decoding, numbers in _alike(runs):
        engine, rows = _shared_engine(runs, numbers)
        predictions = iter(predict(engine, [row for own in rows for row in own], decoding))
        for number, own in zip(numbers, rows, strict=True):
            found[number] = [next(predictions) for _ in own]
    return found


def _ranked(runs: Mapping[int, PreparedRun]) -> dict[int, list[Prediction]]:
    """Which of their choices they find likeliest."""
    from softprompts.cli.loading import ranking_of
    from softprompts.evaluation.predict import Ranking, rank

    groups: dict[tuple[Any, int], list[int]] = {}
    for number, run in runs.items():
        evaluation = run.plan.config.evaluation
        groups.setdefault((evaluation.ranking, evaluation.decoding.batch_size), []).append(number)
    found: dict[int, list[Prediction]] = {}
    for (by, batch_size), numbers in groups.items():
        engine, rows = _shared_engine(runs, numbers)
        rankings = [
            cast(Ranking, ranking_of(own, runs[n].plan.task, engine.frozen, runs[n].plan.config.task, by))
            for n, own in zip(numbers, rows, strict=True)
        ]
        together = Ranking(
            [choices for one in rankings for choices in one.choices],
            by,
            [row for one in rankings for row in one.priors],
        )
        predictions = iter(rank(engine, [row for own in rows for row in own], together, batch_size=batch_size))
        for number, own in zip(numbers, rows, strict=True):
            found[number] = [next(predictions) for _ in own]
    return found


def _shared_engine(runs: Mapping[int, PreparedRun], numbers: Sequence[int]) -> tuple[Engine, list[Sequence[Encoded]]]:
    """Put the prompts of some runs on one model, and give each run's dev inputs with its prompt's place there."""
    from softprompts.inference import Engine
    from softprompts.prompted import PromptedLM
    from softprompts.prompts import SoftPrompt

    first = runs[numbers[0]].objective.prompted
    if len(numbers) == 1:
        return Engine(first), [runs[numbers[0]].rows.inputs]
    prompts = [cast(SoftPrompt, prompt) for number in numbers for prompt in runs[number].objective.prompted.prompts]
    rows = [
        [dataclasses.replace(row, prompt=place) for row in runs[number].rows.inputs]
        for place, number in enumerate(numbers)
    ]
    return Engine(PromptedLM(first.frozen, prompts)), list(rows)


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
