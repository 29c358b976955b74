"""``softprompts library DIR``: a folder of prompts, listed, sorted and searched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from softprompts.cli.output import JsonOption, console_for, write_json
from softprompts.errors import ConfigError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from softprompts.storage.library import LibraryEntry, PromptLibrary, SearchResult

__all__ = ["library"]

_ORDERS = ("name", "task", "created", "length", "score")


def library(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with prompts: DIR/name or DIR/task/name.")],
    search_like: Annotated[
        Path | None,
        typer.Option(metavar="PROMPT", help="Find the prompts most like this one: a directory, or .npy, .pt, .pth."),
    ] = None,
    measure: Annotated[
        str, typer.Option(metavar="NAME", help="How to compare: see `softprompts similarity --help`.")
    ] = "cosine_tokens",
    count: Annotated[int, typer.Option("--count", "-k", min=1, help="How many to find.")] = 10,
    task: Annotated[str | None, typer.Option(metavar="TASK", help="Only prompts of this task.")] = None,
    sort: Annotated[str, typer.Option(metavar="BY", help="name, task, created, length or score.")] = "name",
    metric: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which score to sort by; left out: the first that a prompt has.")
    ] = None,
    lowest_first: Annotated[
        bool, typer.Option("--lowest-first", help="Sort scores upwards, for those that are better when they are low.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """List the prompts in a folder: what each is, its task, its model and its scores; or search them by similarity.

    Only prompt.json is read to list them, and nothing in a prompt is ever executed. Broken prompts are listed with the
    reason. Names are those that a server would take: name, or task/name.
    """
    if sort not in _ORDERS:
        raise ConfigError(f"unknown order '{sort}': {nearest(sort, _ORDERS)}")
    from softprompts.storage.library import PromptLibrary

    shelf = PromptLibrary(directory)
    console = console_for(json)
    report: dict[str, Any] = {"verb": "library", "directory": shelf.root}
    if search_like is not None:
        result = _search(shelf, search_like, measure, count, task)
        _show_search(console, result, measure)
        report |= {"measure": measure, "search_like": search_like}
        report["found"] = [_plain(near.entry) | {"similarity": near.similarity} for near in result.found]
        report["left_out"] = result.left_out
    else:
        entries = [entry for entry in shelf.entries() if task is None or _task(entry) == task]
        entries = _sorted(entries, sort, metric, lowest_first)
        _show(console, entries)
        report["prompts"] = [_plain(entry) for entry in entries]
    write_json(json, report)


def _search(shelf: PromptLibrary, like: Path, measure: str, count: int, task: str | None) -> SearchResult:
    from softprompts.cli.prompt_files import read_given
    from softprompts.transfer.similarity import MEASURES

    chosen = MEASURES.get(measure)
    given = read_given(like)
    fingerprint = given.info.model.fingerprint or None if given.info else None
    return shelf.nearest(given.prompt, chosen, count, fingerprint=fingerprint, task=task)


def _task(entry: LibraryEntry) -> str | None:
    return entry.info.origin.task if entry.info else None


def _score(entry: LibraryEntry, metric: str | None) -> float | None:
    metrics = entry.info.origin.metrics if entry.info else {}
    name = metric if metric is not None else next(iter(metrics), None)
    value = metrics[name].value if name is not None and name in metrics else math.nan
    return None if math.isnan(value) else value


def _sorted(entries: Sequence[LibraryEntry], sort: str, metric: str | None, lowest_first: bool) -> list[LibraryEntry]:
    """In the order that was asked for; what has no such value, and what is broken, comes last."""
    if sort == "score":
        sign = 1 if lowest_first else -1
        scored = [
            (sign * value, entry.name, entry) for entry in entries if (value := _score(entry, metric)) is not None
        ]
        return [entry for *_, entry in sorted(scored)] + [e for e in entries if _score(e, metric) is None]
    intact = [entry for entry in entries if entry.info is not None]
    if sort == "task":
        intact.sort(key=lambda entry: _task(entry) or "~")
    elif sort == "created":
        intact.sort(key=lambda entry: entry.info.origin.created if entry.info else "", reverse=True)
    elif sort == "length":
        intact.sort(key=lambda entry: entry.info.length if entry.info else 0)
    else:
        return list(entries)
    return intact + [entry for entry in entries if entry.info is None]


def _plain(entry: LibraryEntry) -> dict[str, Any]:
    info = entry.info
    if info is None:
        return {"name": entry.name, "problem": entry.problem}
    return {
        "name": entry.name,
        "problem": None,
        "kind": info.kind,
        "placement": info.placement,
        "length": info.length,
        "task": info.origin.task,
        "model": info.model.name or None,
        "fingerprint": info.model.fingerprint or None,
        "metrics": {name: {"value": item.value, "stderr": item.stderr} for name, item in info.origin.metrics.items()},
        "created": info.origin.created,
    }


def _row(entry: LibraryEntry) -> list[Text]:
    info = entry.info
    if info is None:
        return [Text(entry.name), Text(f"broken: {entry.problem}", style="red")]
    scores = "  ".join(f"{name} {item.value:.4g}" for name, item in info.origin.metrics.items())
    model = f"{info.model.name or 'unknown'} {info.model.fingerprint[:8]}".strip()
    cells = [entry.name, f"{info.kind} {info.length}", info.origin.task or "", model, scores, info.origin.created[:10]]
    return [Text(cell) for cell in cells]


def _show(console: Console, entries: Sequence[LibraryEntry]) -> None:
    intact = [entry for entry in entries if entry.info is not None]
    table = Table("name", "kind, length", "task", "model", "scores", "created")
    for entry in intact:
        table.add_row(*_row(entry))
    if intact:
        console.print(table)
    broken = [entry for entry in entries if entry.info is None]
    if broken:
        faults = Table("name", "what is wrong", title=f"{len(broken)} broken", title_justify="left")
        for entry in broken:
            faults.add_row(*_row(entry))
        console.print(faults)
    console.print(f"{len(intact)} prompts")


def _show_search(console: Console, result: SearchResult, measure: str) -> None:
    table = Table(measure, "name", "kind, length", "task", "model", "scores", "created")
    for near in result.found:
        table.add_row(f"{near.similarity:.4f}", *_row(near.entry))
    console.print(table)
    if result.left_out:
        first = result.left_out[0]
        console.print(f"{len(result.left_out)} were left out, such as {first.name}: {first.reason}", markup=False)
