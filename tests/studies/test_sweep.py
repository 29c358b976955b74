"""Cells are files: killed twice, a study ends as one that was never killed; a failed cell does not end it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from softprompts.errors import ArtifactError, CheckpointError
from softprompts.studies.catalog import Plan
from softprompts.studies.report import write_report
from softprompts.studies.results import read_results
from softprompts.studies.sweep import Progress, read_cells, sweep, write_study
from tiny_study import FakeRunner, tiny_plan

FACTS = {"command": "softprompts study tiny", "date": "2026-01-01", "hardware": {}}
TIMES = {"wall_s": 1.0, "cpu_s": 1.0}
"""Stamped over the real times, which differ from run to run."""


def run(plan: Plan, place: Path, runner: FakeRunner, **options: Any) -> dict[str, dict[str, Any]]:
    write_study(plan, place, FACTS)
    return sweep(plan, place, runner, stamp=lambda: TIMES, **options)


def test_killed_twice_the_report_equals_an_unbroken_one(tmp_path: Path):
    plan = tiny_plan()
    ran = []
    for killed_after in (2, 4):  # in the middle of a lot, and between lots
        runner = FakeRunner(killed_after=killed_after)
        with pytest.raises(KeyboardInterrupt):
            run(plan, tmp_path / "killed", runner)
        (tmp_path / "killed" / "cells" / ".x.json.abcd.writing").write_text('{"half": ')  # as a kill may leave behind
        ran += runner.ran
    last = FakeRunner()
    run(plan, tmp_path / "killed", last)
    assert len(ran + last.ran) == len(set(ran + last.ran)) == len(plan.cells) == 12
    run(plan, tmp_path / "unbroken", FakeRunner())
    for name in ("killed", "unbroken"):
        write_report(read_results(tmp_path / name), tmp_path / name / "report")
    files = sorted(path.relative_to(tmp_path / "killed") for path in (tmp_path / "killed" / "report").rglob("*.*"))
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "unbroken" / file).read_bytes()


def test_a_failed_cell_is_recorded_and_can_be_run_again(tmp_path: Path):
    plan, said = tiny_plan(), []
    cells = run(plan, tmp_path, FakeRunner(failing="soft/P=4"), on_progress=said.append)
    failed = [cell for cell in cells.values() if "error" in cell]
    assert [cell["setting"] for cell in failed] == ["soft/P=4"] * 3
    assert failed[0]["error"]["message"] == "a tensor is upset"
    assert len(cells) == 12
    last: Progress = said[-1]
    assert (last.done, last.failed, last.left_out, last.total, last.seconds_left) == (12, 3, 0, 12, 0.0)
    idle = FakeRunner()
    assert run(plan, tmp_path, idle) == cells
    assert idle.ran == []
    again = FakeRunner()
    repaired = run(plan, tmp_path, again, retry=True)
    assert len(again.ran) == 3
    assert not any("error" in cell for cell in repaired.values())


def test_a_seed_that_fails_leaves_the_others_of_its_setting(tmp_path: Path):
    cells = run(tiny_plan(), tmp_path, FakeRunner(failing="soft/P=4", seed=0))
    assert [name for name, cell in cells.items() if "error" in cell] == ["soft--P=4--seed-0"]
    assert cells["soft--P=4--seed-2"]["metrics"]["bleu"] == 31.0


def test_another_study_in_the_folder_is_refused(tmp_path: Path):
    run(tiny_plan(), tmp_path, FakeRunner())
    before = (tmp_path / "study.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"holds a study with other settings: plan.seeds"):
        write_study(tiny_plan(seeds=[7, 8]), tmp_path, FACTS)
    assert (tmp_path / "study.json").read_bytes() == before


def test_seeds_are_added_to_a_study(tmp_path: Path):
    run(tiny_plan(), tmp_path / "grown", FakeRunner())
    added, facts = FakeRunner(), {**FACTS, "date": "2027-01-01", "command": "softprompts study x --seeds 0,1,2,5"}
    write_study(tiny_plan(seeds=[0, 1, 2, 5]), tmp_path / "grown", facts)
    cells = sweep(tiny_plan(seeds=[0, 1, 2, 5]), tmp_path / "grown", added, stamp=lambda: TIMES)
    assert {seed for *_, seed in (name.rpartition("-") for name in added.ran)} == {"5"}
    assert cells == run(tiny_plan(seeds=[0, 1, 2, 5]), tmp_path / "whole", FakeRunner())
    assert json.loads((tmp_path / "grown" / "study.json").read_text())["facts"] == {
        **FACTS,
        "command": facts["command"],
    }
    with pytest.raises(CheckpointError, match=r"plan.seeds"):  # the report would lose cells
        write_study(tiny_plan(), tmp_path / "grown", FACTS)


def test_facts_of_the_first_call_stay(tmp_path: Path):
    write_study(tiny_plan(), tmp_path, FACTS)
    write_study(tiny_plan(), tmp_path, {**FACTS, "date": "2027-01-01"})
    assert json.loads((tmp_path / "study.json").read_text())["facts"] == FACTS


def test_a_damaged_cell_is_named(tmp_path: Path):
    run(tiny_plan(), tmp_path, FakeRunner())
    (tmp_path / "cells" / "soft--P=1--seed-0.json").write_text("{")
    with pytest.raises(ArtifactError, match="delete it to run it again"):
        read_cells(tmp_path)
    with pytest.raises(ArtifactError, match="holds no study"):
        read_results(tmp_path / "cells")
