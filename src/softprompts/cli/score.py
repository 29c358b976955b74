"""``softprompts score PREDICTIONS``: the metrics alone, on anybody's predictions, in the official file formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softprompts.cli.output import JsonOption, console_for, write_json
from softprompts.errors import ConfigError, DataNotFoundError, MissingExtraError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from softprompts.evaluation.score_files import Gold
    from softprompts.evaluation.scorers.base import FloatArray
    from softprompts.tasks import Task

__all__ = ["score"]


def score(
    predictions: Annotated[
        Path, typer.Argument(help="Lines in the order of the records, .jsonl, .json, .tsv or .csv.")
    ],
    task: Annotated[
        str | None, typer.Option("--task", metavar="TASK", help="Whose metrics and references: e2e, webnlg, squad, ...")
    ] = None,
    references: Annotated[
        list[Path] | None,
        typer.Option("--references", metavar="FILE", help="References of your own; repeat it for parallel files."),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", metavar="NAME", help="These metrics instead; repeatable.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="FILE", help="Another system's predictions: is it different?")
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Which records: test, dev, or for webnlg seen, unseen.")
    ] = None,
    lenient: Annotated[
        bool,
        typer.Option("--lenient", help="Count labels that the task does not have as wrong; else they are refused."),
    ] = False,
    resamples: Annotated[int, typer.Option("--resamples", help="Of the bootstrap; 0: no standard errors.")] = 1000,
    seed: Annotated[int, typer.Option("--seed", help="Of the bootstrap.")] = 0,
    json: JsonOption = None,
) -> None:
    """Score a file of predictions: each metric with its bootstrap standard error, and its significance."""
    from softprompts.evaluation.alignment import align
    from softprompts.evaluation.metrics import unusable
    from softprompts.evaluation.score_files import read_predictions

    console = console_for(json)
    sheet = _metrics(task, metric or [])
    lacking = unusable(list(sheet.values()))
    _tell(lacking, {key: name for key, name in sheet.items() if name in lacking}, console_for("-"))
    usable = {key: name for key, name in sheet.items() if name not in lacking}
    if not usable:
        raise MissingExtraError("none of these metrics can be computed: " + "; ".join(dict.fromkeys(lacking.values())))
    gold = _gold(task, split, references or [])
    systems = [align(read_predictions(p), gold, lenient=lenient) for p in (predictions, against) if p is not None]
    content = _content(usable, systems, gold, resamples, seed)
    _show(content, console)
    about = {
        "task": task,
        "predictions": predictions,
        "against": against,
        "references": gold.path,
        "records": len(gold.references),
        "resamples": resamples,
        "seed": seed,
        "skipped": {key: lacking[name] for key, name in sheet.items() if name in lacking},
    }
    write_json(json, {**content, "about": about})


def _content(
    metrics: Mapping[str, str], systems: Sequence[Sequence[str]], gold: Gold, resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Score one system, or two and their difference; per name in the report."""
    from softprompts.evaluation.metrics import compare_rows, rows_of, score_rows
    from softprompts.evaluation.scorers import METRICS

    table = {key: METRICS.get(name) for key, name in metrics.items()}
    for start in {metric.start for metric in table.values()}:
        if start is not None:
            start()
    content: dict[str, dict[str, Any]] = {}
    for key in sorted(table, key=lambda key: table[key].start is not None):  # what takes long to start comes last
        name = table[key].name
        rows: list[FloatArray] = [rows_of(name, texts, gold.references, gold.groups or None) for texts in systems]
        value, *others = [score_rows(name, one, resamples=resamples, seed=seed) for one in rows]
        content[key] = {"value": value.value, "stderr": value.stderr, "scale": table[key].scale, "metric": name}
        if others:
            gap = compare_rows(name, rows[0], rows[1], resamples=resamples, seed=seed)
            content[key]["against"] = {
                "value": others[0].value,
                "stderr": others[0].stderr,
                "difference": gap.difference,
                "difference_stderr": gap.stderr,
                "p_value": gap.p_value,
            }
    return {key: content[key] for key in metrics}


def _metrics(task: str | None, names: Sequence[str]) -> Mapping[str, str]:
    """Names in the report -> metrics. A name of a task's sheet means the sheet's metric."""
    from softprompts.evaluation.scorers import METRICS
    from softprompts.evaluation.sheets import SHEETS
    from softprompts.tasks import get_task

    if task is None and not names:
        raise ConfigError("name a task with --task (such as e2e), or metrics with --metric (and --references)")
    own: Mapping[str, str] = {}
    if task is not None:
        sheet = SHEETS.get(task)
        own = {name: name for name in get_task(task).metrics} if sheet is None else sheet.metrics
    unknown = next((name for name in names if name not in own and name not in METRICS), None)
    if unknown is not None:
        raise ConfigError(f"unknown metric '{unknown}': {nearest(unknown, {*own, *METRICS.names()})}")
    return {name: own.get(name, name) for name in names} if names else own


def _gold(task: str | None, split: str | None, files: Sequence[Path]) -> Gold:
    from softprompts.evaluation.alignment import with_choices
    from softprompts.evaluation.score_files import read_references
    from softprompts.evaluation.sheets import SHEETS
    from softprompts.tasks import data_root, get_task

    chosen = None if task is None else get_task(task)
    if files:
        gold = read_references(files)
        return with_choices(gold, chosen.choices) if chosen is not None and chosen.choices else gold
    if chosen is None:
        raise ConfigError("references are missing: give --references FILE, or --task for those of a known task")
    sheet, root = SHEETS.get(chosen.name), data_root()
    wanted = split or ("test" if sheet is not None and "test" in sheet.references else chosen.splits[-1])
    published = () if sheet is None else sheet.references.get(wanted, ())
    if published and root is not None and all((root / name).is_file() for name in published):
        return read_references([root / name for name in published])
    return _gold_of_task(chosen, wanted)


def _gold_of_task(task: Task, split: str) -> Gold:
    from softprompts.config import TaskConfig
    from softprompts.evaluation.score_files import Gold
    from softprompts.tasks import SPLITS

    if split not in SPLITS:
        raise DataNotFoundError(
            f"the references of '{split}' of task '{task.name}' are not in the data folder; give them with --references"
        )
    examples = task.load(split, TaskConfig(name=task.name))
    groups = tuple(str(one.metadata.get("group", "")) for one in examples)
    return Gold(
        f"the {split} split of '{task.name}'",
        # SQuAD's references have spaces around punctuation, as models are taught; other systems' predictions do not.
        tuple(one.metadata.get("answers", one.all_references) for one in examples),
        tuple(one.id for one in examples),
        # ReCoRD's entities are choices of each example; its script takes any text, and so do the other free tasks.
        tuple(task.choices for _ in examples) if task.choices else (),
        groups if all(groups) else (),
    )


def _tell(lacking: Mapping[str, str], keys: Mapping[str, str], console: Console) -> None:
    """Say once per reason what is left out."""
    for reason in dict.fromkeys(lacking.values()):
        names = ", ".join(key for key, name in keys.items() if lacking[name] == reason)
        console.print(f"left out: {names}: {reason}", markup=False)


def _show(content: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    from rich.table import Table

    compared = any("against" in entry for entry in content.values())
    more = ("other", "difference", "±", "p") if compared else ()
    table = Table("metric", "value", "±", "scale", *more, caption="±: standard error")
    for key, entry in content.items():
        row = [key, _number(entry["value"]), _number(entry["stderr"]), entry["scale"]]
        if compared:
            gap = entry["against"]
            row += [_number(gap[name]) for name in ("value", "difference", "difference_stderr", "p_value")]
        table.add_row(*row)
    console.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
