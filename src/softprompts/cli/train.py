"""``softprompts train RECIPE``: a prompt, or a whole model as its yardstick."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from softprompts.cli.loading import TargetOption, TemplateOption, template_overrides
from softprompts.cli.output import JsonOption, console_for, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from softprompts.baselines import FineTuningObjective
    from softprompts.config import TrainRecipe
    from softprompts.models import FrozenLM
    from softprompts.prompts import SoftPrompt
    from softprompts.tasks.task import Task
    from softprompts.training import Event, FitResult, PromptObjective, Selection
    from softprompts.types import Encoded, Example

__all__ = ["run_recipe", "train"]

_RECIPE_FILE = "recipe.yaml"
_FREE_SECTIONS = ("output_dir", "model.device")
"""Keys of a recipe that may differ when a run is resumed: they say where it runs, not what it does."""
_REFERENCE_ROWS = 512
"""Training rows on which the model without a prompt is measured where there is no dev split."""


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file, for example recipes/prefix_tuning/e2e.yaml.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change one value of the recipe; repeatable.")
    ] = None,
    format: TemplateOption = None,
    target: TargetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint, exactly.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="The run's folder, instead of the recipe's.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Train what a recipe describes, keep the best on the dev split, and save it.

    The folder holds prompt/ (or model/ for a fine-tuned model), recipe.yaml with every setting, events.jsonl and the
    checkpoints. Stop with Ctrl-C at any time: the state is saved, and the same command with --resume goes on exactly.
    """
    from softprompts.config import TrainRecipe, load_recipe

    config = load_recipe(recipe, TrainRecipe, [*template_overrides(format, target), *(set_ or [])])
    if output is not None:
        config = dataclasses.replace(config, output_dir=str(output))
    console = console_for(json)
    result = run_recipe(config, resume=resume, console=console)
    numbers = "  ".join(f"{name} {value:.4g}" for name, value in result["metrics"].items())
    best = f"; best on dev at step {result['best_step']}: {numbers}" if numbers else ""
    console.print(f"{result['steps']} steps in {result['seconds']:.0f} s ({result['reason']}){best}", markup=False)
    console.print(f"saved in {result['saved']}", markup=False)
    write_json(json, result)


def run_recipe(config: TrainRecipe, *, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Train what a recipe describes.

    Args:
        config: The recipe.
        resume: Go on from the last checkpoint in its ``output_dir``, if there is one.
        console: Where progress is shown; ``None`` shows nothing.

    Returns:
        What ``--json`` writes: plain data.

    Raises:
        SoftPromptsError: Any of the errors of :mod:`softprompts.errors` that a recipe can lead to.
    """
    from softprompts.cli.loading import load_frozen
    from softprompts.tasks import get_task
    from softprompts.training import EncodedBatches, fit, refuse_unfinished_run, show_progress, to_tensorboard

    directory = Path(config.output_dir)
    task = get_task(config.task)
    selection = _selection(config, task)
    _write_recipe(config, directory, resume, lambda: refuse_unfinished_run(directory, config.training))
    frozen = load_frozen(config.model)
    train_rows, dev_rows, dev_inputs = _rows(config, task, frozen, selection)
    objective = _objective(config, task, frozen)
    _check_lengths(config, objective, [*train_rows, *dev_rows])
    reference = _reference_loss(config, objective, dev_rows or train_rows[:_REFERENCE_ROWS])
    if console is not None:
        trained = sum(parameter.numel() for parameter in objective.parameters())
        console.print(
            f"{task.name}: {len(train_rows)} rows to train on, {len(dev_rows)} dev; {trained:,} parameters to train, "
            f"{100 * trained / frozen.parameter_count:.3g} % of {frozen.name}; loss without them {reference:.4f}",
            markup=False,
        )
    with ExitStack() as stack:
        listeners = [stack.enter_context(to_tensorboard(directory / "tensorboard"))]
        if console is not None:
            bar = show_progress(console, config.training.max_steps, score=selection.metric)
            listeners.append(stack.enter_context(bar))

        def on_event(event: Event) -> None:
            for listener in listeners:
                listener(event)

        result = fit(
            objective,
            EncodedBatches(train_rows, config.training.batch_size, frozen.pad_id, config.training.seed),
            config.training,
            optimizer=config.optimizer,
            schedule=config.schedule,
            run_dir=directory,
            validate=_validator(config, task, objective, dev_rows, dev_inputs, selection) if dev_rows else None,
            on_event=on_event,
            resume=resume,
            reference_loss=reference,
            selection=selection,
        )
    return _save(config, objective, frozen, result, reference)


def _selection(config: TrainRecipe, task: Task) -> Selection:
    """Find out which dev metric picks the best checkpoint, before anything heavy is loaded."""
    from softprompts.errors import ConfigError
    from softprompts.evaluation.scorers import METRICS
    from softprompts.training import Selection

    name = config.evaluation.selection or task.selection
    if "dev" not in task.splits and config.evaluation.selection is not None:
        raise ConfigError(
            f"evaluation.selection is '{name}', but task '{task.name}' has no dev split to measure it on; set task.dev"
        )
    if name == "loss":
        return Selection()
    return Selection(name, maximize=METRICS.get(name).higher_is_better)


def _write_recipe(config: TrainRecipe, directory: Path, resume: bool, refuse_unfinished: Callable[[], None]) -> None:
    """Keep the resolved recipe beside the run, and refuse to resume a run that was made by another one."""
    import yaml

    from softprompts.config import to_dict
    from softprompts.errors import CheckpointError, StorageError
    from softprompts.training import changed_keys

    path = directory / _RECIPE_FILE
    if not resume:
        refuse_unfinished()
    elif path.exists():
        changed = changed_keys(yaml.safe_load(path.read_text(encoding="utf-8")), to_dict(config))
        changed = [item for item in changed if not item.startswith(_FREE_SECTIONS)]
        if changed:
            raise CheckpointError(
                f"the run in '{directory}' was started with another recipe: {'; '.join(changed)}; resume with its own "
                f"('{path}'), or train into another directory"
            )
    text = yaml.safe_dump(_plain(to_dict(config)), sort_keys=False, allow_unicode=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        directory.mkdir(parents=True, exist_ok=True)
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


def _rows(
    config: TrainRecipe, task: Task, frozen: FrozenLM, selection: Selection
) -> tuple[list[Encoded], list[Encoded], list[Encoded]]:
    """Encode the training rows, the dev rows, and the dev inputs where outputs have to be generated from them."""
    from softprompts.cli.loading import encode_rows

    prompt = -1 if config.method == "fine_tuning" else 0

    def encode(examples: Sequence[Example], with_target: bool = True) -> list[Encoded]:
        return encode_rows(examples, task, frozen, config.task, prompt=prompt, with_target=with_target)

    dev = task.load("dev", config.task) if "dev" in task.splits else []
    inputs = encode(dev[: config.evaluation.limit], with_target=False) if selection.metric != "loss" else []
    return encode(task.load("train", config.task)), encode(dev), inputs


def _objective(config: TrainRecipe, task: Task, frozen: FrozenLM) -> PromptObjective | FineTuningObjective:
    """Build what is trained."""
    from softprompts.baselines import FineTuningObjective
    from softprompts.prompted import PromptedLM
    from softprompts.prompts import build_prompt
    from softprompts.storage import load_prompt
    from softprompts.training import PromptObjective

    if config.method == "fine_tuning":
        return FineTuningObjective(frozen, config.training.loss)
    initializer = config.prompt.initializer
    source = None
    if initializer.name == "prompt" and initializer.prompt is not None:
        source = load_prompt(initializer.prompt, frozen).prompt
    if initializer.name == "labels" and not initializer.labels:
        initializer = dataclasses.replace(initializer, labels=task.choices)  # the task knows its class words
    prompt_config = dataclasses.replace(config.prompt, initializer=initializer)
    prompt = build_prompt(prompt_config, frozen, seed=config.training.seed, source=source)
    return PromptObjective(PromptedLM(frozen, [prompt]), config.training.loss)


def _check_lengths(
    config: TrainRecipe, objective: PromptObjective | FineTuningObjective, rows: Sequence[Encoded]
) -> None:
    """Refuse rows that do not fit into the context now, and not in the middle of the run."""
    from softprompts.models.inputs import check_length

    prompted = objective.prompted
    length = max((cast("SoftPrompt", prompt).length for prompt in prompted.prompts), default=0)
    check_length(prompted.frozen.geometry, length, max(len(row.ids) for row in rows))


def _reference_loss(
    config: TrainRecipe, objective: PromptObjective | FineTuningObjective, rows: Sequence[Encoded]
) -> float:
    """Measure the model alone on these rows, in the unit of the training loss."""
    from softprompts.training import in_order, mean_loss, without_prompts

    batches = in_order(rows, config.training.batch_size, pad_id=objective.prompted.frozen.pad_id)
    return mean_loss(objective, without_prompts(batches))


def _validator(
    config: TrainRecipe,
    task: Task,
    objective: PromptObjective | FineTuningObjective,
    rows: Sequence[Encoded],
    inputs: Sequence[Encoded],
    selection: Selection,
) -> Callable[[], dict[str, float]]:
    """Make the function that measures the dev split: its loss, and the selection metric if that is another one."""
    from softprompts.config import DecodingConfig
    from softprompts.evaluation.evaluate import evaluate
    from softprompts.inference import Engine
    from softprompts.training import in_order, mean_loss

    # A recipe that says nothing about decoding leaves it to the task.
    given = config.evaluation.decoding
    decoding = task.decoding if given == DecodingConfig() else given
    frozen = objective.prompted.frozen

    def validate() -> dict[str, float]:
        loss = mean_loss(objective, in_order(rows, config.training.batch_size, pad_id=frozen.pad_id))
        if not inputs:
            return {"loss": loss}
        engine = Engine(objective.prompted)
        report = evaluate(engine, inputs, metrics=[selection.metric], decoding=decoding, resamples=0)
        return {"loss": loss, selection.metric: report.metrics[selection.metric].value}

    return validate


def _save(
    config: TrainRecipe,
    objective: PromptObjective | FineTuningObjective,
    frozen: FrozenLM,
    result: FitResult,
    reference_loss: float,
) -> dict[str, Any]:
    """Save what was trained and say how it went."""
    from softprompts.baselines import FineTuningObjective
    from softprompts.storage import save_prompt

    directory = Path(config.output_dir)
    trained = sum(parameter.numel() for parameter in objective.parameters())
    if isinstance(objective, FineTuningObjective):
        saved, stored = objective.save(directory / "model"), trained
    else:
        prompt = cast("SoftPrompt", objective.prompted.prompts[0])
        saved = save_prompt(
            prompt,
            directory / "prompt",
            frozen=frozen,
            task=config.task.name,
            recipe=config,
            metrics=result.best_metrics,
            overwrite=True,
        )
        stored = prompt.stored_parameters
    return {
        "verb": "train",
        "method": config.method,
        "model": frozen.name,
        "task": config.task.name,
        "saved": str(saved),
        "output_dir": str(directory),
        "trained_parameters": trained,
        "stored_parameters": stored,
        "model_parameters": frozen.parameter_count,
        "steps": result.steps,
        "reason": result.reason,
        "best_step": result.best_step,
        "metrics": dict(result.best_metrics),
        "reference_loss": reference_loss,
        "last_loss": result.last_loss,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "tokens_per_s": result.tokens / result.seconds if result.seconds else None,
    }
