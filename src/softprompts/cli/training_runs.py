"""What ``softprompts train`` makes of a recipe: the rows and the objective of every run, and what it leaves behind."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from softprompts.cli.objectives import AnyObjective
    from softprompts.config import TrainRecipe
    from softprompts.models import FrozenLM
    from softprompts.prompts import SoftPrompt
    from softprompts.tasks.task import Task
    from softprompts.training import Event, FitResult, Member, Selection
    from softprompts.types import Encoded, Example

__all__ = ["MEAN", "Plan", "PreparedRun", "Rows", "plan", "prepare", "save", "write_recipes"]

_RECIPE_FILE = "recipe.yaml"
_FREE_SECTIONS = ("output_dir", "model.device", "together")
"""Keys of a recipe that may differ when a run is resumed: they say where it runs, not what it does (what the prompts of
a list do is in the recipe of each one's own folder)."""
MEAN = "mean"
"""``evaluation.selection`` for the mean of several metrics."""
_REFERENCE_ROWS = 512
"""Training rows on which the model without a prompt is measured where there is no dev split."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What can be known of a run before anything heavy is loaded."""

    name: str
    """Of the prompt in a list; empty for a run on its own."""
    config: TrainRecipe
    task: Task
    selection: Selection
    measured: tuple[str, ...] = ()
    """Metrics of dev outputs: the one that selects, or those whose mean does; empty where the loss selects. Those of
    the likeliest choices begin with ``ranked/``."""

    @property
    def directory(self) -> Path:
        """The run's folder."""
        return Path(self.config.output_dir)


@dataclasses.dataclass(frozen=True)
class Rows:
    """The encoded rows of a run, and what the model alone makes of them."""

    train: Sequence[Encoded]
    dev: Sequence[Encoded]
    inputs: Sequence[Encoded]
    """Dev rows without targets, where outputs have to be predicted from them."""
    reference_loss: float
    kept_bytes: int = 0
    """What the keys and values of their inputs will take in memory, where they are kept."""


@dataclasses.dataclass(frozen=True)
class PreparedRun:
    """A run that is ready to be trained."""

    plan: Plan
    objective: AnyObjective
    rows: Rows

    @property
    def trained_parameters(self) -> int:
        """Numbers that the optimizer changes."""
        return sum(parameter.numel() for parameter in self.objective.parameters())

    def member(self, on_event: Callable[[Event], None]) -> Member[Any]:
        """Put it in the form that the training loop takes."""
        from softprompts.baselines.autoprompt import AutoPromptObjective
        from softprompts.training import EncodedBatches, Member, wants_batches_by_length

        config, prompted = self.plan.config, self.objective.prompted
        training = config.training
        by_length = wants_batches_by_length(training, prompted)
        batches = EncodedBatches(self.rows.train, training.batch_size, prompted.frozen.pad_id, training.seed, by_length)
        searches = isinstance(self.objective, AutoPromptObjective)
        return Member(
            self.objective,
            self.objective.batches if isinstance(self.objective, AutoPromptObjective) else batches,
            config.training,
            optimizer=config.optimizer,
            schedule=config.schedule,
            run_dir=self.plan.directory,
            name=self.plan.name,
            on_event=on_event,
            reference_loss=None if searches else self.rows.reference_loss,
            validate_first=searches,
            selection=self.plan.selection,
        )


def plan(config: TrainRecipe, name: str = "") -> Plan:
    """Look the task up and find out which dev metric picks the best checkpoint.

    Raises:
        ConfigError: The task or the metric is unknown, or there is nothing to measure it on.
        MissingExtraError: The metric cannot be computed here.
    """
    from softprompts.errors import ConfigError, MissingExtraError
    from softprompts.evaluation.classification import RANKED
    from softprompts.evaluation.metrics import unusable
    from softprompts.evaluation.scorers import METRICS
    from softprompts.evaluation.selection import averageable
    from softprompts.tasks import get_task
    from softprompts.training import Selection

    if config.method == "few_shot":
        raise ConfigError("method 'few_shot' trains nothing: judge it with `softprompts evaluate --recipe FILE`")
    task = get_task(config.task)
    metric = config.evaluation.selection or task.selection
    if "dev" not in task.splits and config.evaluation.selection is not None:
        raise ConfigError(
            f"evaluation.selection is '{metric}', but task '{task.name}' has no dev split to measure it on; set "
            "task.dev"
        )
    if metric == "loss":
        return Plan(name, config, task, Selection())
    measured = averageable(config.evaluation.metrics or task.metrics) if metric == MEAN else (metric,)
    plain = [one.removeprefix(RANKED) for one in measured]
    if config.evaluation.prediction == "rank":
        measured = tuple(f"{RANKED}{one}" for one in plain)
        metric = MEAN if metric == MEAN else measured[0]
    selection = Selection(metric, maximize=metric == MEAN or METRICS.get(plain[0]).higher_is_better)
    for one, reason in unusable(plain).items() if "dev" in task.splits else ():
        raise MissingExtraError(f"metric '{one}' cannot be computed: {reason}")
    return Plan(name, config, task, selection, measured)


def write_recipes(recipes: Sequence[TrainRecipe], resume: bool, refuse_unfinished: Callable[[], None]) -> None:
    """Keep each resolved recipe in its folder, and refuse to resume a run that was made by another one.

    Raises:
        CheckpointError: A run was started with another recipe; nothing was written.
        ConfigError: A folder holds an unfinished run and ``resume`` is not set.
        StorageError: A recipe cannot be written.
    """
    if resume:
        for recipe in recipes:
            _refuse_changes(recipe)
    else:
        refuse_unfinished()
    for recipe in recipes:
        _write(recipe)


def _refuse_changes(config: TrainRecipe) -> None:
    import yaml

    from softprompts.config import to_dict
    from softprompts.errors import CheckpointError
    from softprompts.training import changed_keys

    path = Path(config.output_dir) / _RECIPE_FILE
    if not path.exists():
        return
    changed = changed_keys(yaml.safe_load(path.read_text(encoding="utf-8")), to_dict(config))
    changed = [item for item in changed if not item.startswith(_FREE_SECTIONS)]
    if changed:
        raise CheckpointError(
            f"the run in '{config.output_dir}' was started with another recipe: {'; '.join(changed)}; resume with its "
            f"own ('{path}'), or train into another directory"
        )


def _write(config: TrainRecipe) -> None:
    import yaml

    from softprompts.config import to_dict
    from softprompts.errors import StorageError

    path = Path(config.output_dir) / _RECIPE_FILE
    text = yaml.safe_dump(_plain(to_dict(config)), sort_keys=False, allow_unicode=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StorageError(f"the run's recipe cannot be written to '{path}': {error.strerror or error}") from error


def _plain(value: Any) -> Any:
    """Turn tuples into lists: plain YAML knows no tuple."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def prepare(plans: Sequence[Plan], frozen: FrozenLM, *, measure: bool = True) -> list[PreparedRun]:
    """Encode the rows and build what is trained; runs on the same records share the work.

    Args:
        plans: One per run.
        frozen: The model that all of them share.
        measure: Whether the loss of the model alone is measured; otherwise it is not a number.

    Raises:
        SoftPromptsError: What the records or the prompt's settings can lead to.
    """
    from softprompts.cli.objectives import build_objective

    encoded: dict[str, tuple[list[Encoded], list[Encoded], list[Encoded]]] = {}
    references: dict[str, float] = {}
    runs: list[PreparedRun] = []
    for one in plans:
        config = one.config
        measures = one.selection.metric != "loss"
        key = repr((config.task, config.evaluation.limit, measures, one.measured))
        if key not in encoded:
            encoded[key] = _encoded(one, frozen)
        train, dev, inputs = encoded[key]
        objective = build_objective(config, one.task, frozen, train)
        _check_lengths(objective, [*train, *dev])
        kept = 0
        if config.model.cache_source_gib is not None:
            limit_bytes = int(config.model.cache_source_gib * 2**30)
            kept = _keep_sources(one, objective, runs[0].objective if runs else None, [train, dev], limit_bytes)
        key = repr((config.task, config.training.batch_size, config.training.loss))
        if key not in references and not measure:
            references[key] = math.nan
        if key not in references:
            references[key] = _reference_loss(config, objective, dev or train[:_REFERENCE_ROWS])
        runs.append(PreparedRun(one, objective, Rows(train, dev, inputs, references[key], kept)))
    return runs


def _keep_sources(
    one: Plan,
    objective: AnyObjective,
    first: AnyObjective | None,
    splits: Sequence[Sequence[Encoded]],
    limit_bytes: int,
) -> int:
    """Let a run read each input once, together with the first run; returns the bytes that this takes."""
    from softprompts.errors import ConfigError

    config, prompted = one.config, objective.prompted
    if config.method != "prompt" or config.prompt.placement != "infix":
        raise ConfigError(
            "model.cache_source_gib keeps inputs that the prompt does not change, so it needs prompt.placement "
            "infix; set model.cache_source_gib to null"
        )
    prompted.sources = first.prompted.sources if first is not None else None
    sources = prompted.sources or prompted.keep_sources(limit_bytes=limit_bytes)
    frozen = prompted.frozen
    kept: dict[Any, list[tuple[int, ...]]] = {}
    for dtype, rows in zip((frozen.training_dtype or frozen.dtype, frozen.dtype), splits, strict=True):
        kept.setdefault(dtype, []).extend(row.ids[: row.infix_at] for row in rows)
    return sources.needed_bytes(kept)


def _encoded(one: Plan, frozen: FrozenLM) -> tuple[list[Encoded], list[Encoded], list[Encoded]]:
    """Encode the training rows, the dev rows, and the dev inputs where outputs have to be predicted from them."""
    from softprompts.cli.loading import encode_rows
    from softprompts.cli.objectives import carries_prompt
    from softprompts.errors import ConfigError
    from softprompts.evaluation.classification import RANKED

    config, task = one.config, one.task
    prompt = 0 if carries_prompt(config) else -1

    def encode(examples: Sequence[Example], with_target: bool = True) -> list[Encoded]:
        return encode_rows(examples, task, frozen, config.task, prompt=prompt, with_target=with_target)

    dev = task.load("dev", config.task) if "dev" in task.splits else []
    inputs = encode(dev[: config.evaluation.limit], with_target=False) if one.selection.metric != "loss" else []
    ranked = [name for name in one.measured if name.startswith(RANKED)]
    if ranked and not all(row.example.choices for row in inputs):
        raise ConfigError(
            f"'{ranked[0]}' is to be measured on dev, but task '{task.name}' has no choices to rank; set "
            "evaluation.prediction=generate"
        )
    return encode(task.load("train", config.task)), encode(dev), inputs


def _check_lengths(objective: AnyObjective, rows: Sequence[Encoded]) -> None:
    """Refuse rows that do not fit into the context now, and not in the middle of the run."""
    from softprompts.models.inputs import check_length

    prompted = objective.prompted
    length = max((cast("SoftPrompt", prompt).length for prompt in prompted.prompts), default=0)
    check_length(prompted.frozen.geometry, length, max(len(row.ids) for row in rows))


def _reference_loss(config: TrainRecipe, objective: AnyObjective, rows: Sequence[Encoded]) -> float:
    """Measure the model alone on these rows, in the unit of the training loss."""
    from softprompts.training import in_order, mean_loss, without_prompts

    batches = in_order(rows, config.training.batch_size, pad_id=objective.prompted.frozen.pad_id)
    return mean_loss(objective, without_prompts(batches))


def save(run: PreparedRun, frozen: FrozenLM, result: FitResult) -> dict[str, Any]:
    """Save what was trained and say how it went.

    A run that diverged, while others went on, leaves its best prompt on dev; where it has none, nothing is saved.
    """
    from softprompts.cli.objectives import save_trained, stored_parameters
    from softprompts.cli.steering import peak_memory_bytes

    config = run.plan.config
    usable = result.reason != "diverged" or result.best_step
    saved = save_trained(run.objective, config, frozen, result.best_metrics) if usable else None
    return {
        "verb": "train",
        "method": config.method,
        "model": frozen.name,
        "task": config.task.name,
        "saved": str(saved) if saved else None,
        "output_dir": str(run.plan.directory),
        "trained_parameters": run.trained_parameters,
        "stored_parameters": stored_parameters(run.objective),
        "model_parameters": frozen.parameter_count,
        "steps": result.steps,
        "reason": result.reason,
        "best_step": result.best_step,
        "metrics": dict(result.best_metrics),
        "reference_loss": run.rows.reference_loss,
        "last_loss": result.last_loss,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "tokens_per_s": result.tokens / result.seconds if result.seconds else None,
        "peak_memory_bytes": peak_memory_bytes(frozen),
    }
