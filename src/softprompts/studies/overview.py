"""One page over several studies: every claim of the papers with its verdict, and why where there is none."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from softprompts.errors import ConfigError
from softprompts.storage.directory import replace_file
from softprompts.studies.catalog import get_study, studies, uncovered
from softprompts.studies.definition import Claim
from softprompts.studies.report import render
from softprompts.studies.results import Result
from softprompts.studies.verdict import RULE, Outcome, Verdict

__all__ = ["NOT_RUN", "write_overview"]

NOT_RUN = "not run here"
_PAPERS = ("Li & Liang 2021", "Lester et al. 2021")
_OTHERS = "Other papers, and questions of our own"


@dataclass(frozen=True)
class _Line:
    """A claim in the table."""

    claim: Claim
    study: str
    folder: str | None
    """Of its study, beside the page."""
    outcome: str
    here: str
    """The differences, or why there are none."""


def write_overview(results: Sequence[Result], directory: Path, file: Path) -> Path:
    """Write a Markdown page: all claims of all studies by paper, the claims that no study tests, what the studies cost.

    Args:
        results: Of the studies that were run, one per study.
        directory: Where they lie, each in a folder of its own or in this one.
        file: The page; links go from there.

    Returns:
        The file.

    Raises:
        ConfigError: A study is there twice, so that its claims would have two verdicts.
        StorageError: The page cannot be written.
    """
    names = [result.plan.study.name for result in results]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ConfigError(
            f"'{directory}' holds {', '.join(twice)} more than once; a page of verdicts needs each study once, so move "
            "the folders of one scale somewhere else"
        )
    run = dict(zip(names, results, strict=True))
    lines = [line for name in sorted({*studies(), *run}) for line in _lines(name, run.get(name), directory, file)]
    order = [*get_args(Outcome), NOT_RUN]
    counts = Counter(line.outcome for line in lines)
    context = {
        "papers": {
            paper: own for paper in (*_PAPERS, _OTHERS) if (own := [one for one in lines if _paper(one) == paper])
        },
        "counts": {outcome: counts[outcome] for outcome in order if counts[outcome]},
        "claims": len(lines),
        "uncovered": uncovered(),
        "studies": [_facts(result, directory, file) for result in results],
        "cpu_hours": sum(result.cpu_seconds for result in results) / 3600,
        "rule": RULE,
    }
    return replace_file(file, render("verdicts.md.j2", context).encode())


def _lines(name: str, result: Result | None, directory: Path, file: Path) -> list[_Line]:
    if result is None:
        why = "the study was not run"
        return [_Line(claim, name, None, NOT_RUN, why) for claim in get_study(name).claims]
    folder = _link(result, directory, file)
    return [_Line(one.claim, name, folder, one.outcome, _here(one, result)) for one in result.verdicts]


def _paper(line: _Line) -> str:
    return next((paper for paper in _PAPERS if line.claim.source.startswith(paper)), _OTHERS)


def _here(verdict: Verdict, result: Result) -> str:
    """The differences with their intervals, or what is missing."""
    if verdict.outcome != "not measured":
        known = [one for one in verdict.differences if one.mean is not None]
        return "; ".join(f"{one.words}: {one.mean:+.3g} [{one.low:+.3g}, {one.high:+.3g}]" for one in known)
    asked = {
        term.partition(":")[0]
        for check in verdict.claim.at(result.plan.scale_name)
        for term in (*check.better, *check.than)
    }
    rows = {row.setting.name: row for row in result.rows}
    reasons = []
    for message, settings in result.left_out.items():
        if own := sorted(asked.intersection(settings)):
            reasons.append(f"left out: {', '.join(own)}; {message}")
    for name in sorted(asked):
        row = rows.get(name)
        if row is None:
            reasons.append(f"not one of its settings: {name}")
        elif row.failed:
            reasons.append(f"failed: {name}")
        elif not row.left_out and len(row.seeds) < 2:
            reasons.append(f"fewer than two seeds: {name}")
    return ". ".join(reasons) or "the metric has no value"


def _facts(result: Result, directory: Path, file: Path) -> Mapping[str, Any]:
    hardware = result.facts.get("hardware", {})
    return {
        "name": result.plan.study.name,
        "folder": _link(result, directory, file),
        "cells": f"{result.done} of {len(result.plan.cells)}",
        "failed": len(result.failed),
        "left_out": sum(len(settings) for settings in result.left_out.values()),
        "seeds": ", ".join(map(str, result.plan.scale.seeds)),
        "minutes": f"{result.cpu_seconds / 60:.1f}",
        "dates": ", ".join(result.dates),
        "commits": ", ".join(result.commits),
        "command": result.facts.get("command", ""),
        "hardware": ", ".join(str(hardware[key]) for key in ("processor", "cores") if hardware.get(key))
        + (" cores" if hardware.get("cores") else ""),
    }


def _link(result: Result, directory: Path, file: Path) -> str:
    """The study's folder as seen from the page."""
    place = result.place if result.place is not None else directory
    return Path(os.path.relpath(place.resolve(), file.resolve().parent)).as_posix()
