"""``softprompts ensemble train|predict|evaluate``: several prompts of one task answer together."""

from __future__ import annotations

import dataclasses
import json as json_module
import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softprompts.cli.evaluate import recipe_of
from softprompts.cli.generate import read_lines
from softprompts.cli.loading import TargetOption, TemplateOption, template_overrides
from softprompts.cli.output import JsonOption, console_for, write_json
from softprompts.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console

    from softprompts.config import TrainRecipe
    from softprompts.evaluation.ensemble_scores import EnsembleReport
    from softprompts.evaluation.predict import Ranking
    from softprompts.inference import Engine
    from softprompts.storage.ensemble import Combination, EnsembleInfo
    from softprompts.tasks.task import Task
    from softprompts.types import Encoded

__all__ = ["evaluate", "predict", "train"]


class _Combine(str, Enum):  # noqa: UP042  (typer shows the values of a str enumeration)
    """How answers become one."""

    vote = "vote"
    likeliest = "likeliest"
    average = "average"
    rank = "rank"


_PlaceArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of an ensemble, with ensemble.json.")]
_CombineOption = Annotated[
    _Combine | None,
    typer.Option(
        "--combine",
        help="vote: majority; likeliest: highest mean log-probability; average: mean of the next-token distributions; "
        "rank: mean of the probabilities of a task's choices (default: the ensemble's own).",
    ),
]
_ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="Name, directory or 'bundled' (default: that of the members)."),
]
_SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Change a value: decoding.batch_size=64, task.test=FILE; repeatable."),
]


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file of one prompt, as for softprompts train.")],
    members: Annotated[
        int, typer.Option("--members", min=2, help="Prompts; their seeds count up from the recipe's.")
    ] = 5,
    combine: Annotated[
        _Combine | None,
        typer.Option(
            "--combine", help="How answers become one (default: vote where the task has choices, else likeliest)."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change one value of the recipe; repeatable.")
    ] = None,
    format: TemplateOption = None,
    target: TargetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoints, exactly.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="The ensemble's folder, instead of the recipe's.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Train several prompts of one task in one pass, from different seeds, and write ensemble.json beside them.

    Every member is a run of its own in the folder, seed-0 and so on, and its prompt/ can be used and inspected alone.
    """
    from softprompts.cli.train import run_recipe
    from softprompts.config import TrainRecipe, load_recipe, varied
    from softprompts.storage.ensemble import save_ensemble
    from softprompts.tasks import get_task

    config = load_recipe(recipe, TrainRecipe, [*template_overrides(format, target), *(set_ or [])])
    if config.together:
        raise ConfigError(
            f"'{recipe}' has a list 'together', but the members of an ensemble differ in their seed alone; remove the "
            "list, or train it with softprompts train"
        )
    first = config.training.seed
    config = varied(config, ",".join(str(first + number) for number in range(members)))
    if output is not None:
        config = dataclasses.replace(config, output_dir=str(output))
    how: Combination = combine.value if combine is not None else _default_combination(config, get_task(config.task))
    console = console_for(json)
    result = run_recipe(config, resume=resume, console=console)
    saved = [one["saved"] for one in result["prompts"].values() if one["saved"]]
    info = save_ensemble(config.output_dir, saved, combine=how)
    lost = members - len(saved)
    console.print(
        f"{len(saved)} members in {result['seconds']:.0f} s, answers by {how}; saved in {config.output_dir}"
        + (f"; {lost} diverged and are left out" if lost else ""),
        markup=False,
    )
    write_json(json, {**result, "verb": "ensemble train", "ensemble": dataclasses.asdict(info)})


def _default_combination(config: TrainRecipe, task: Task) -> Combination:
    if not task.choices:
        return "likeliest"
    return "rank" if config.evaluation.prediction == "rank" else "vote"


def predict(
    ensemble: _PlaceArgument,
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="Lines of input (default: standard input).")
    ] = None,
    combine: _CombineOption = None,
    model: _ModelOption = None,
    seed: Annotated[int, typer.Option("--seed", help="Of sampling.")] = 0,
    set_: _SetOption = None,
    jsonl: Annotated[
        bool, typer.Option("--jsonl", help="One JSON object per line, with votes and every member's answer.")
    ] = False,
) -> None:
    """Lines in, lines out: every line is answered by all members in one forward pass.

    A line is the input of the ensemble's task as plain text, or a JSON object {"input": "..."}.
    """
    from softprompts.cli.loading import encode_rows
    from softprompts.evaluation.ensemble import predict_ensemble
    from softprompts.evaluation.ensemble_scores import answer_fields
    from softprompts.storage.ensemble import read_ensemble
    from softprompts.types import Example

    read_ensemble(ensemble)  # refused before anybody types lines into nothing
    texts = [_input_of(line, number) for number, line in enumerate(read_lines(file), start=1)]
    loaded = _load(ensemble, model, None, set_ or [])
    examples = [Example(text, "", id=text[:40], choices=loaded.task.choices) for text in texts]
    frozen = loaded.engine.frozen
    rows = encode_rows(examples, loaded.task, frozen, loaded.recipe.task, with_target=False)
    how = loaded.info.combine if combine is None else combine.value
    answers = predict_ensemble(
        loaded.engine,
        rows,
        loaded.recipe.evaluation.decoding,
        how=how,
        ranking=loaded.ranking(rows, how),
        with_members=jsonl,
        seed=seed,
    )
    for text, answer in zip(texts, answers, strict=True):
        line = {"input": text, **answer_fields(answer)}
        full = json_module.dumps(line, ensure_ascii=False, allow_nan=False)
        sys.stdout.write((full if jsonl else " ".join(answer.prediction.text.split())) + "\n")


def _input_of(line: str, number: int) -> str:
    """Read a line: plain text, or a JSON object with the key ``input``."""
    text = line.rstrip("\r")
    try:
        content = json_module.loads(line) if line.lstrip().startswith("{") else None
    except json_module.JSONDecodeError:
        content = None
    if isinstance(content, dict):
        found = content.get("input")
        if not isinstance(found, str):
            raise DataError(f"line {number}: 'input' is {found!r}, expected text")
        return found
    return text


def evaluate(
    ensemble: _PlaceArgument,
    combine: _CombineOption = None,
    model: _ModelOption = None,
    task: Annotated[
        str | None, typer.Option("--task", metavar="TASK", help="Name of the task (default: the members' own).")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="train, dev or test.")] = "test",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="A random sample of so many records.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of sampling and of the bootstrap.")] = 0,
    set_: _SetOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Where samples.jsonl and evaluation.json go.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Report average, best member and ensemble for every metric, with standard errors and significance."""
    from rich.progress import Progress

    from softprompts.cli.loading import encode_rows
    from softprompts.evaluation.ensemble_scores import evaluate_ensemble
    from softprompts.evaluation.evaluate import write_report

    limits = [] if limit is None else [f"task.limit_train={limit}", f"task.limit_dev={limit}"]
    loaded = _load(ensemble, model, task, [*(set_ or []), *limits])
    recipe, engine = loaded.recipe, loaded.engine
    how = loaded.info.combine if combine is None else combine.value
    examples = loaded.task.load(split, recipe.task)
    rows = encode_rows(examples, loaded.task, engine.frozen, recipe.task, with_target=False)
    console = console_for(json)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("answering", total=len(rows) * (len(loaded.info.members) + (how == "average")))
        report = evaluate_ensemble(
            engine,
            rows,
            how=how,
            metrics=recipe.evaluation.metrics or loaded.task.metrics,
            decoding=recipe.evaluation.decoding,
            ranking=loaded.ranking(rows, how),
            seed=seed,
            facts={**_facts(loaded, ensemble), "split": split, "limit": limit},
            on_progress=lambda count: progress.advance(bar, count),
        )
    _show(report, loaded.info, console)
    if output is not None:
        console.print(f"written to {write_report(report, output)}", markup=False)
    write_json(json, report.to_dict())


# --------------------------------------------------------------------------------------------------------------------
# What both of them load and show
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """An ensemble on its model."""

    info: EnsembleInfo
    recipe: TrainRecipe
    """The first member's, with what the command line changes."""
    task: Task
    engine: Engine
    members: Sequence[Mapping[str, Any]]
    """What is known of each prompt, as plain data."""

    def ranking(self, rows: Sequence[Encoded], how: str) -> Ranking | None:
        """Encode the choices of the rows where answers are ranked."""
        from softprompts.cli.loading import ranking_of

        if how != "rank":
            return None
        return ranking_of(rows, self.task, self.engine.frozen, self.recipe.task, self.recipe.evaluation.ranking)


def _load(place: Path, model: str | None, task: str | None, overrides: Sequence[str]) -> _Loaded:
    """Read what the ensemble is, load its model, and put the members on it."""
    from softprompts.cli.loading import load_frozen
    from softprompts.inference import Engine
    from softprompts.prompted import PromptedLM
    from softprompts.storage.ensemble import load_ensemble, read_ensemble
    from softprompts.tasks import get_task

    recipe = recipe_of(place / read_ensemble(place).members[0], model, task, overrides)
    frozen = load_frozen(recipe.model)
    info, loaded = load_ensemble(place, frozen)
    members = [
        {
            "directory": name,
            "kind": one.info.kind,
            "placement": one.info.placement,
            "length": one.info.length,
            "seed": one.info.origin.seed,
            "sha256": one.info.tensors.sha256,
        }
        for name, one in zip(info.members, loaded, strict=True)
    ]
    engine = Engine(PromptedLM(frozen, [one.prompt for one in loaded]))
    return _Loaded(info, recipe, get_task(recipe.task), engine, members)


def _facts(loaded: _Loaded, place: Path) -> dict[str, Any]:
    from softprompts import __version__
    from softprompts.config import to_dict

    frozen, recipe = loaded.engine.frozen, loaded.recipe
    return {
        "verb": "ensemble evaluate",
        "ensemble": str(place),
        "members": list(loaded.members),
        "task": loaded.task.name,
        "setting": to_dict(recipe.task.setting),
        "model": {"name": frozen.name, "fingerprint": frozen.fingerprint, "parameters": frozen.parameter_count},
        "dtype": recipe.model.dtype,
        "quantization": recipe.model.quantization,
        "device": str(frozen.device),
        "version": __version__,
    }


def _show(report: EnsembleReport, info: EnsembleInfo, console: Console) -> None:
    from rich.table import Table

    table = Table("metric", "average", "best", "ensemble", "ensemble - best", "p")
    for name, score in report.scores.items():
        difference = score.against_best
        cells = [_cell(one.value, one.stderr) for one in (score.average, score.members[score.best], score.ensemble)]
        p_value = "" if difference.p_value is None else f"{difference.p_value:.3f}"
        table.add_row(name, *cells, _cell(difference.difference, difference.stderr), p_value)
    console.print(table)
    for name, score in report.scores.items():
        console.print(f"best by {name}: {info.members[score.best]}", markup=False)
    facts = report.to_dict()
    votes = ""
    if facts["tied"] is not None:
        votes = f"; {facts['tied']} ties, {facts['all_illegal']} records without a legal answer"
    console.print(
        f"{facts['records']} records by {len(info.members)} members in {report.seconds:.1f} s, answers by "
        f"{report.combine}{votes}",
        markup=False,
    )


def _cell(value: float, stderr: float | None) -> str:
    return f"{value:.2f}" if stderr is None else f"{value:.2f} ± {stderr:.2f}"
