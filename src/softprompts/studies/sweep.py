"""Run the cells of a study: every one a JSON file, written whole or not at all, so a killed study goes on.

The sweep knows nothing of models. It is given a *runner* that trains and judges the missing cells of one lot (all seeds
of a setting on a task) and yields what each one found; whatever the runner itself leaves on the disk is its own affair.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompts.config import to_dict
from softprompts.errors import ArtifactError, CheckpointError, DataNotFoundError, TrainingInterrupted
from softprompts.storage.directory import replace_file
from softprompts.storage.recorded import read_object
from softprompts.studies.catalog import Cell, Plan
from softprompts.studies.cost import cell_flop, seconds_left
from softprompts.training.checkpoint import changed_keys

__all__ = [
    "CELLS",
    "STUDY_FILE",
    "Found",
    "Progress",
    "Runner",
    "is_left_out",
    "read_cells",
    "read_study",
    "sweep",
    "write_study",
]

STUDY_FILE, CELLS = "study.json", "cells"
_FORMAT = 1
_MAX_BYTES = 1 << 28
"""Of one file: no study comes near it."""

Found = Mapping[str, Any]
"""What a runner says of a cell: ``metrics`` (name -> number or null), ``train``, ``samples``, ``history``, ``seconds``;
or ``error``."""

Runner = Callable[[Sequence[Cell], Path], Iterable[tuple[Cell, Found]]]
"""``runner(missing, folder)``: runs the missing cells of one lot in their order; their files are kept in ``folder``."""


@dataclass(frozen=True)
class Progress:
    """How far a study is."""

    done: int
    failed: int
    left_out: int
    total: int
    seconds_left: float | None
    """At the speed of the cells of this study; ``None`` before the first."""
    cell: Cell
    """The one that is done now."""
    found: Found
    metrics: tuple[str, ...]
    """What the study reports."""


def write_study(plan: Plan, directory: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what the study is, or check that the folder holds the same one, perhaps with fewer seeds.

    Args:
        plan: The study.
        directory: Its folder.
        facts: Command, date, commit and hardware. Of a study that goes on, the first ones stay; where seeds are added,
            the command becomes the new one, which alone makes the whole.

    Raises:
        CheckpointError: The folder holds another study, or this one with other settings.
        StorageError: It cannot be written.
    """
    content = {"format": _FORMAT, "study": to_dict(plan.study), "scale": plan.scale_name, "plan": to_dict(plan.scale)}
    content = json.loads(json.dumps(content))
    path = directory / STUDY_FILE
    if path.exists():
        before = read_study(directory)
        name, held, facts_before = before["study"]["name"], before["plan"], before["facts"]
        if set(held["seeds"]) < set(plan.scale.seeds):
            held = {**held, "seeds": plan.scale.seeds}
            facts_before = {**facts_before, "command": facts["command"]}
        changed = changed_keys(
            {"name": name, "scale": before["scale"], "plan": held},
            {"name": plan.study.name, "scale": plan.scale_name, "plan": content["plan"]},
        )
        if changed:
            raise CheckpointError(
                f"'{directory}' holds a study with other settings: {'; '.join(changed[:5])}; give the same ones to go "
                "on with it, or another folder after --out"
            )
        content["facts"] = facts_before
    else:
        content["facts"] = dict(facts)
    replace_file(path, _json(content))
    return dict(content)


def read_study(directory: Path) -> dict[str, Any]:
    """Read ``study.json``.

    Raises:
        ArtifactError: There is none, or it is damaged.
    """
    path = directory / STUDY_FILE
    if not path.exists():
        raise ArtifactError(f"'{directory}' holds no {STUDY_FILE}; run softprompts study NAME --out first")
    content = read_object(path, _MAX_BYTES)
    if content.get("format") != _FORMAT:
        raise ArtifactError(f"'{path}' is none of this version (format {_FORMAT})")
    return content


def read_cells(directory: Path) -> dict[str, dict[str, Any]]:
    """Read the cells that are there, by name, in alphabetical order.

    Raises:
        ArtifactError: One is damaged. Cells are written whole, so something else did that; delete it to run it again.
    """
    found = {}
    for path in sorted((directory / CELLS).glob("*.json")):
        try:
            found[path.stem] = read_object(path, _MAX_BYTES)
        except ArtifactError as error:
            raise ArtifactError(f"the cell '{path}' cannot be read: {error}; delete it to run it again") from error
    return found


def is_left_out(cell: Mapping[str, Any]) -> bool:
    """Whether a cell could not be run because its model or data are not there, which says nothing of the setting."""
    return bool("error" in cell and cell["error"]["type"] == DataNotFoundError.__name__)


def sweep(
    plan: Plan,
    directory: Path,
    runner: Runner,
    *,
    retry: bool = False,
    stamp: Callable[[], Mapping[str, Any]] = dict,
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Run every cell that is not there yet.

    Args:
        plan: The study; its folder was prepared by :func:`write_study`.
        directory: The folder.
        runner: Trains and judges.
        retry: Run the cells again that failed. Those whose model or data were not there are tried again anyway.
        stamp: What is kept with each new cell, such as the commit.
        on_progress: Called after every cell.

    Returns:
        All cells by name.

    Raises:
        StorageError: A cell cannot be written.
        TrainingInterrupted: Somebody stopped the study; calling it again goes on.
    """
    known = read_cells(directory)
    done = {name: cell for name, cell in known.items() if not (is_left_out(cell) or (retry and "error" in cell))}
    flop = {cell.name: cell_flop(plan, cell) for cell in plan.cells}
    spent = 0.0  # seconds of this call, and the work that they paid for
    paid = 0.0
    processed = time.process_time()

    def keep(cell: Cell, found: Found, seconds: float) -> None:
        nonlocal spent, paid, processed
        before, processed = processed, time.process_time()
        spent, paid = spent + seconds, paid + flop[cell.name]
        content = {
            "name": cell.name,
            "setting": cell.setting.name,
            "task": cell.task.name,
            "seed": cell.seed,
            **found,
            "wall_s": seconds,
            "cpu_s": processed - before,
            **stamp(),
        }
        content = json.loads(_json(content))
        replace_file(directory / CELLS / f"{cell.name}.json", _json(content))
        done[cell.name] = content
        if on_progress is not None:
            left_out = sum(is_left_out(one) for one in done.values())
            failed = sum("error" in one for one in done.values()) - left_out
            rest = sum(amount for name, amount in flop.items() if name not in done)
            left = seconds_left(rest, paid, spent)
            on_progress(Progress(len(done), failed, left_out, len(flop), left, cell, content, plan.scale.metrics))

    for lot, cells in plan.lots().items():
        missing = [cell for cell in cells if cell.name not in done]
        if missing:
            _run_lot(missing, directory / "runs" / lot, runner, keep)
    return {cell.name: done[cell.name] for cell in plan.cells}


def _run_lot(missing: Sequence[Cell], folder: Path, runner: Runner, keep: Callable[[Cell, Found, float], None]) -> None:
    """Run one lot; an error is that of the first cell that is left, and the runner starts again with the others."""
    left = {cell.name: cell for cell in missing}
    started = time.perf_counter()
    found: Iterator[tuple[Cell, Found]] | None = None
    while left:
        result: Found
        try:
            if found is None:
                found = iter(runner(tuple(left.values()), folder))
            cell, result = next(found)
        except (KeyboardInterrupt, TrainingInterrupted):
            raise
        except StopIteration:
            break
        except Exception as error:  # recorded; the study goes on
            trace = "".join(traceback.format_exception(error)[-3:])
            cell, found = next(iter(left.values())), None  # runners go in order, and this one has ended
            result = {"error": {"type": type(error).__name__, "message": str(error), "trace": trace}}
        now = time.perf_counter()
        del left[cell.name]
        keep(cell, result, now - started)
        started = now
    assert not left, f"the runner left out {sorted(left)}"


def _json(content: Any) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n").encode()
