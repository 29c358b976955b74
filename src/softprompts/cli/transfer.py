"""``softprompts transfer tasks|models|steps``: what prompts do on other tasks, and how they come to other models."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softprompts.cli.output import JsonOption, console_for, write_json
from softprompts.errors import ConfigError

if TYPE_CHECKING:
    from softprompts.config import TransferRecipe

__all__ = ["models", "steps", "tasks"]


class _Split(str, Enum):  # noqa: UP042  (typer shows the values of a str enumeration)
    """What is judged on."""

    train = "train"
    dev = "dev"
    test = "test"


class _Measure(str, Enum):  # noqa: UP042
    """What is judged by."""

    auto = "auto"
    loss = "loss"
    accuracy = "accuracy"


_SplitOption = Annotated[_Split | None, typer.Option("--split", help="What is judged on (default: dev).")]
_LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="A random sample of so many records.")]
_MeasureOption = Annotated[
    _Measure | None,
    typer.Option("--measure", help="Default: accuracy (the likeliest choice) where a task has choices, else the loss."),
]


def tasks(
    prompts: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Saved prompts, or folders that hold some.")],
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="TASK", help="Judge on it; repeatable (default: all trained on)."),
    ] = None,
    type_: Annotated[
        list[str] | None,
        typer.Option("--type", metavar="TASK=TYPE", help="Type of a task, for the means within and across types."),
    ] = None,
    similarity: Annotated[
        list[str] | None,
        typer.Option(
            "--similarity", metavar="NAME", help="Correlate it with transfer: cosine, neurons, ...; repeatable."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="The frozen model (default: that of the prompts).")
    ] = None,
    split: _SplitOption = None,
    limit: _LimitOption = None,
    measure: _MeasureOption = None,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Where cells and transfer.json go.")] = Path(
        "runs/transfer"
    ),
    json: JsonOption = None,
) -> None:
    """Measure every prompt on every task without any training, relative to the task's own prompt.

    Each cell is kept in a file, so the same command goes on where it was stopped, and new prompts cost their own cells
    only. With types: means within a type of task and across types. With similarities: Spearman's rank correlation.
    """
    from softprompts.cli.transfer_tasks import cross_task
    from softprompts.config import replaced
    from softprompts.config.transfer import JudgeConfig

    console = console_for(json)
    judging = replaced(JudgeConfig(), _judging(split, limit, measure))
    types = dict(_pair(text) for text in type_ or [])
    result = cross_task(prompts, task or [], judging, output, model, types, similarity or [], console)
    console.print(f"saved in {output}", markup=False)
    write_json(json, result)


def models(
    prompts: Annotated[
        list[Path] | None, typer.Argument(metavar="[DIR]...", help="Saved prompts of the source model.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help="YAML file with the settings.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change one value of the recipe; repeatable.")
    ] = None,
    source_model: Annotated[
        str | None, typer.Option("--source-model", metavar="MODEL", help="The model that the prompts were made for.")
    ] = None,
    target_model: Annotated[
        str | None, typer.Option("--target-model", metavar="MODEL", help="The model that gets prompts.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", metavar="NAME", help="match, projector, least_squares, copy or random.")
    ] = None,
    own: Annotated[
        list[Path] | None,
        typer.Option("--own", metavar="DIR", help="The target's own prompt, to measure recovery; one per prompt."),
    ] = None,
    split: _SplitOption = None,
    limit: _LimitOption = None,
    measure: _MeasureOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run was stopped, exactly.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="The run's folder, instead of the recipe's.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Make prompts for another model out of prompts for this one.

    match: without labels, the target's outputs with its prompt are brought to the source's, on plain text (same
    vocabulary). projector: a map trained on other tasks. least_squares: a map between the words that both models know.
    copy, random: what the others have to beat. Says which share of its own prompt's gain the target model recovers.
    """
    from rich.table import Table

    from softprompts.cli.transfer_models import transfer_models

    values: dict[str, Any] = {f"judge.{key}": value for key, value in _judging(split, limit, measure).items()}
    options = {"source_model.name_or_path": source_model, "target_model.name_or_path": target_model, "method": method}
    options["output_dir"] = None if output is None else str(output)
    values |= {key: value for key, value in options.items() if value is not None}
    values |= {"prompts": [str(path) for path in prompts]} if prompts else {}
    values |= {"judge.own": [str(path) for path in own]} if own else {}
    console = console_for(json)
    result = transfer_models(_recipe(recipe, values, set_ or []), resume=resume, console=console)
    table = Table("prompt", "measure", "none", "transferred", "own", "recovery")
    for one in result["prompts"]:
        cells = [one[key]["value"] if one[key] else None for key in ("none", "transferred", "own")]
        table.add_row(one["name"], one["measure"], *(_number(value) for value in [*cells, one["recovery"]]))
    console.print(table)
    console.print(f"saved in {result['output_dir']}", markup=False)
    write_json(json, result)


def steps(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of training runs.")],
    own: Annotated[Path, typer.Option("--own", metavar="RUN", help="The run whose best dev score is to be reached.")],
    metric: Annotated[
        str, typer.Option("--metric", help="The dev metric: loss, or one of which more is better.")
    ] = "loss",
    json: JsonOption = None,
) -> None:
    """Say after how many updates each run first reached the best dev score of another one."""
    from softprompts.cli.transfer_tasks import steps_of_runs

    write_json(json, steps_of_runs(runs, own, metric, console_for(json)))


def _judging(split: _Split | None, limit: int | None, measure: _Measure | None) -> dict[str, Any]:
    """Options that were given, as keys of ``judge``."""
    given = {"split": split and split.value, "limit": limit, "measure": measure and measure.value}
    return {key: value for key, value in given.items() if value is not None}


def _pair(text: str) -> tuple[str, str]:
    name, equals, kind = text.partition("=")
    if not (name and equals and kind):
        raise ConfigError(f"--type {text!r} is not of the form TASK=TYPE, such as glue_sst2=sentiment")
    return name, kind


def _recipe(path: Path | None, values: dict[str, Any], overrides: list[str]) -> TransferRecipe:
    """Put a recipe together: the file, then the options, then the overrides."""
    from softprompts.config import load_recipe, override, replaced
    from softprompts.config.transfer import TransferRecipe

    recipe = TransferRecipe() if path is None else load_recipe(path, TransferRecipe)
    return override(replaced(recipe, values), overrides)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
