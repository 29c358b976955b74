"""A report is one file that asks nobody for anything, and says what the cells say."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from softprompts.studies.figures import draw, standalone
from softprompts.studies.report import write_report
from softprompts.studies.results import Result, read_results
from softprompts.studies.sweep import sweep, write_study
from softprompts.studies.verdict import RULE
from tiny_study import FakeRunner, tiny_plan


def result_of(place: Path, runner: FakeRunner | None = None, **changes: Any) -> Result:
    plan = tiny_plan(**changes)
    write_study(plan, place, {"command": "softprompts study tiny --out x", "hardware": {"processor": "abacus"}})
    sweep(plan, place, runner or FakeRunner(), stamp=lambda: {"date": "2026-01-01", "commit": "abc1234"})
    return read_results(place)[0]


def test_values_rows_and_verdicts(tmp_path: Path):
    result = result_of(tmp_path)
    assert result.values["soft/P=4"]["bleu"] == {0: 30.0, 1: 30.5, 2: 31.0}
    row = result.rows[1]
    assert (row.setting.name, row.seeds, row.published) == ("soft/P=4", (0, 1, 2), "BLEU 69.7 (GPT-2)")
    assert row.numbers["bleu"].mean == 30.5
    assert row.numbers["bleu"].stderr == pytest.approx(0.5 / 3**0.5)
    assert [one.outcome for one in result.verdicts] == ["reproduced in direction", "not reproduced"]


def test_several_tasks_are_averaged(tmp_path: Path):
    tasks = [{"name": "one"}, {"name": "two", "set": {"task.name": "e2e"}}]
    result = result_of(tmp_path, tasks=tasks)
    assert len(result.cells) == 24
    assert result.values["soft/P=1"]["bleu"] == {0: 15.0, 1: 15.5, 2: 16.0}


def test_the_html_is_whole_and_self_contained(tmp_path: Path):
    result_of(tmp_path / "study", FakeRunner(failing="tuned/P=1"))
    html = write_report(read_results(tmp_path / "study"), tmp_path / "out").read_text()
    assert not re.search(r'(src|href)="(?!#)', html)
    assert not re.search(r"url\((?!#)|@import|<script", html)
    assert "A &lt;tiny&gt; study" in html
    assert "a &lt;b&gt;" in html  # texts of data sets are no markup
    for text in ("reproduced in direction", "not measured", "30.50 ± 0.289", "BLEU 69.7 (GPT-2)", "abacus", "abc1234",
                 "a tensor is upset", "softprompts study tiny --out x", RULE[:60]):  # fmt: skip
        assert text in html
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "| soft | P=4 | 30.50 ± 0.289 |" in markdown
    assert "(plots/tiny-tiny.svg)" in markdown
    assert (tmp_path / "out" / "plots" / "tiny-tiny.svg").exists()
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").read_text().splitlines()))
    own = [row for row in rows if (row["series"], row["point"], row["metric"]) == ("soft", "P=4", "bleu")]
    assert [(row["seed"], float(row["value"])) for row in own] == [("0", 30.0), ("1", 30.5), ("2", 31.0)]


def test_several_studies_make_one_report(tmp_path: Path):
    result_of(tmp_path / "a")
    result_of(tmp_path / "b", metrics=["loss"])
    results = read_results(tmp_path)
    html = write_report(results, tmp_path).read_text()
    assert "What 2 studies say about 4 claims" in html


@pytest.mark.parametrize("kind", ["line", "bars", "curve", "scatter"])
def test_plots_are_svg_in_the_colour_of_the_text(tmp_path: Path, kind: str):
    result = result_of(tmp_path, metrics=["bleu", "loss", "stored_parameters"])
    study = result.plan.study
    other = Result(
        replace(result.plan, study=replace(study, plot=replace(study.plot, kind=kind))), result.facts, result.cells
    )
    svg = draw(other)
    assert svg is not None
    ElementTree.fromstring(svg)
    assert "currentColor" in svg
    assert not re.search(r"#000000|#010203|<metadata", svg)
    assert "prefers-color-scheme" in standalone(svg)
    assert draw(other) == svg
    html = write_report([other], tmp_path / "report").read_text()
    assert ("One line per seed" in html, "Bars and whiskers" in html) == (kind == "curve", kind != "curve")


@pytest.mark.parametrize("kind", ["line", "bars"])
def test_a_setting_without_numbers_leaves_the_second_panel(tmp_path: Path, kind: str):
    result = result_of(tmp_path, FakeRunner(failing="soft/P=4"))
    study = replace(result.plan.study, plot=replace(result.plan.study.plot, kind=kind))
    svg = draw(replace(result, plan=replace(result.plan, study=study)))
    assert svg is not None
    assert {">bleu</text>", ">loss</text>"} <= set(re.findall(r">\w+</text>", svg))


def test_an_empty_study_has_a_report(tmp_path: Path):
    write_study(tiny_plan(), tmp_path, {})
    html = write_report(read_results(tmp_path), tmp_path).read_text()
    assert "0 of 12 cells" in html
    assert "<svg" not in html
