"""``softprompts study NAME`` and ``softprompts report DIR``: an ablation of the papers, and what came of it."""

from __future__ import annotations

import datetime
import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softprompts.cli.output import JsonOption, console_for, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from softprompts.studies.catalog import Plan
    from softprompts.studies.sweep import Progress

__all__ = ["report", "study"]


class _Scale(str, Enum):  # noqa: UP042  (typer shows the values of a str enumeration)
    """How large."""

    tiny = "tiny"
    paper = "paper"


def study(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Which study; 'list' names all of them.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Its folder; goes on with what is there.")
    ] = None,
    scale: Annotated[
        _Scale, typer.Option("--scale", help="tiny: our small LMs; paper: the paper's models, data and settings.")
    ] = _Scale.tiny,
    model: Annotated[str | None, typer.Option("--model", metavar="MODEL", help="Another frozen model.")] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", metavar="N,N,...", help="Instead of the study's own.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Change a recipe value of all cells; what makes a setting stays."),
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run cells that failed once more.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the cells and what they will cost; run and write nothing.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Run an ablation of the papers: every setting with every seed, each a file, so that it can be killed at any time.

    The same command goes on where it was. A cell that fails is recorded with its error, and the study goes on.
    softprompts report DIR then writes tables, plots and verdicts.
    """
    from softprompts.config import TrainRecipe, parse_override
    from softprompts.errors import ConfigError
    from softprompts.studies.catalog import get_study, make_plan, studies

    console = console_for(json)
    if name == "list":
        for one in studies():
            console.print(f"{one:<24} {get_study(one).question}", markup=False)
        write_json(json, {one: get_study(one).question for one in studies()})
        return
    changes = {".".join(keys): value for keys, value in (parse_override(text, TrainRecipe) for text in set_ or [])}
    plan = make_plan(
        get_study(name), scale.value, model=model, seeds=None if seeds is None else _numbers(seeds), changes=changes
    )
    if dry_run:
        write_json(json, _foretell(plan, out, console))
        return
    if out is None:
        raise ConfigError("a study needs a folder for its cells; name it with --out, such as --out runs/studies/x")
    write_json(json, _run(plan, out, retry, console))


def _numbers(text: str) -> list[int]:
    from softprompts.errors import ConfigError

    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--seeds is '{text}', expected whole numbers with commas between them, 0,1,2") from error


def _run(plan: Plan, out: Path, retry: bool, console: Console) -> dict[str, Any]:
    """Run what is missing, and say how it went."""
    import torch

    from softprompts.bench.machine import machine
    from softprompts.cli.study_runs import CellRunner
    from softprompts.folder_lock import alone_in
    from softprompts.studies.sweep import is_left_out, sweep, write_study

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hardware = machine(device)
    command = shlex.join(["softprompts", *sys.argv[1:]])
    with alone_in(out):
        write_study(plan, out, {"command": command, "date": _today(), "hardware": hardware})
        console.print(f"{plan.study.title}: {len(plan.cells)} cells in {out}", markup=False)
        cells = sweep(
            plan,
            out,
            CellRunner(plan, out),
            retry=retry,
            stamp=lambda: {"date": _today(), "commit": hardware["commit"]},
            on_progress=lambda progress: _tell(progress, console),
        )
    left_out = [name for name, cell in cells.items() if is_left_out(cell)]
    failed = [name for name, cell in cells.items() if "error" in cell and name not in left_out]
    said = f"{len(cells)} cells, {len(failed)} failed"
    said += f", {len(left_out)} left out because their model or data are not there" if left_out else ""
    console.print(f"{said}; next: softprompts report {shlex.quote(str(out))}", markup=False)
    seconds = sum(cell["wall_s"] for cell in cells.values())
    return {"verb": "study", "study": plan.study.name, "scale": plan.scale_name, "directory": str(out),
            "cells": len(cells), "failed": failed, "left_out": left_out, "seconds": seconds}  # fmt: skip


def _today() -> str:
    return datetime.datetime.now(tz=datetime.UTC).date().isoformat()


def _tell(progress: Progress, console: Console) -> None:
    """One line per cell."""
    from softprompts.studies.sweep import is_left_out

    cell, found = progress.cell, progress.found
    if "error" in found:
        said = f"{'left out' if is_left_out(found) else 'failed'}: {found['error']['message']}"
    else:
        known = [(name, found["metrics"].get(name)) for name in progress.metrics[:2]]
        said = "  ".join(f"{name} {value:.4g}" for name, value in known if value is not None)
    left = "" if progress.seconds_left is None else f"; about {_duration(progress.seconds_left)} left"
    console.print(f"[{progress.done}/{progress.total}{left}] {cell.name}: {said}", markup=False)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _foretell(plan: Plan, out: Path | None, console: Console) -> dict[str, Any]:
    """List the cells with predicted costs; cells that are done already say how fast this machine is."""
    from rich.table import Table

    from softprompts.studies.cost import ACCELERATOR_FLOP_PER_S, cell_flop, measured_speed, speed_of
    from softprompts.studies.sweep import read_cells

    done = read_cells(out) if out is not None else {}
    flop = {cell.name: cell_flop(plan, cell) for cell in plan.cells}
    if plan.scale_name == "paper":
        speed, how = ACCELERATOR_FLOP_PER_S, "an accelerator at 3e13 operations per second"
    else:
        known = speed_of(done, flop)
        speed = known or measured_speed()
        how = (
            "this machine, by the cells that are done" if known else "this machine were it free, by a short measurement"
        )
    table = Table("cell", "model", "method", "steps", "TFLOP", "predicted", "state")
    rows = []
    for cell in plan.cells:
        state = "" if cell.name not in done else _state(done[cell.name])
        row = {"cell": cell.name, **_summary(plan, cell), "flop": flop[cell.name], "state": state}
        row["seconds"] = flop[cell.name] / speed
        rows.append(row)
        shown = [row["cell"], row["model"], row["method"], str(row["steps"]), f"{row['flop'] / 1e12:.3g}"]
        table.add_row(*shown, _duration(row["seconds"]), state)
    console.print(table)
    rest = sum(row["seconds"] for row in rows if not row["state"])
    console.print(f"{len(rows)} cells, about {_duration(rest)} for what is missing, on {how}", markup=False)
    return {"verb": "study", "study": plan.study.name, "scale": plan.scale_name, "cells": rows, "seconds": rest,
            "predicted_for": how}  # fmt: skip


def _state(found: Mapping[str, Any]) -> str:
    from softprompts.studies.sweep import is_left_out

    return "left out" if is_left_out(found) else "failed" if "error" in found else "done"


def _summary(plan: Plan, cell: Any) -> dict[str, Any]:
    from softprompts.studies.catalog import recipe_of
    from softprompts.studies.cost import trained_steps

    recipe = recipe_of(plan, cell, "")
    method: str = recipe.method if cell.setting.transfer is None else "transfer"
    method = f"{method} x {cell.setting.members}" if cell.setting.members else method
    return {"model": recipe.model.name_or_path, "method": method, "steps": trained_steps(cell, recipe)}


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a study, or of several.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where the report goes (default: into the folder).")
    ] = None,
    verdicts: Annotated[
        Path | None,
        typer.Option(
            "--verdicts",
            metavar="FILE",
            help="Instead: one Markdown page with every claim, those not run here included.",
        ),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Write tables, plots and a verdict per claim: report.html (one file), report.md with its plots, results.csv.

    A study that is not finished is reported with what it has.
    """
    from softprompts.studies.overview import write_overview
    from softprompts.studies.report import write_report
    from softprompts.studies.results import read_results

    results = read_results(directory)
    place = directory if out is None else out
    written = write_report(results, place) if verdicts is None else write_overview(results, directory, verdicts)
    console = console_for(json)
    for result in results:
        for verdict in result.verdicts:
            console.print(f"{result.plan.study.name}: {verdict.outcome}: {verdict.claim.text}", markup=False)
    console.print(f"written to {written}", markup=False)
    write_json(json, {"verb": "report", "written": str(written), "studies": [one.to_dict() for one in results]})
