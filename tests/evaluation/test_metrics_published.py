"""Every published score that the data folder holds outputs for, to the last published digit."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from softprompts.evaluation.alignment import align
from softprompts.evaluation.metrics import score, unusable
from softprompts.evaluation.score_files import read_predictions, read_references
from softprompts.tasks import data_root

pytestmark = pytest.mark.data

E2E = {
    "BLEU": ("e2e_bleu", 100),
    "NIST": ("nist", 1),
    "METEOR": ("meteor", 100),
    "ROUGE_L": ("rouge_l", 100),
    "CIDEr": ("cider", 1),
}
"""Column of the official table -> our metric, our scale over theirs."""


def folder(name: str) -> Path:
    root = data_root()
    path = (root or Path()) / name
    if root is None or not path.is_dir():
        pytest.skip(f"{name} is not there: set SOFTPROMPTS_DATA")
    return path


def scored(metric: str, predictions: Path, *references: Path, resamples: int = 0) -> float:
    gold = read_references(references)
    return score(metric, align(read_predictions(predictions), gold), gold.references, resamples=resamples).value


@pytest.mark.parametrize("system", ["tgen", "slug", "zhang", "chen", "zhaw1"])
@pytest.mark.parametrize("column", E2E)
def test_e2e(system: str, column: str):
    path = folder("metric_refs/e2e")
    metric, factor = E2E[column]
    if lacking := unusable([metric]):
        pytest.skip(lacking[metric])
    with (path / "scores.tsv").open(encoding="utf-8") as lines:
        official = {row["system"]: row[column] for row in csv.DictReader(lines, delimiter="\t")}
    ours = scored(metric, path / "outputs" / f"{system}.txt", path / "test_references.jsonl")
    assert f"{ours / factor:.4f}" == official[system]


def test_dart():
    path = folder("metric_refs/dart")
    references = [path / f"ref{number}.txt" for number in range(3)]
    published = json.loads((path / "scores.json").read_text(encoding="utf-8"))["published_and_reproduced"]
    ours = scored("multi_bleu", path / "bart-large_dart.txt", *references)
    assert round(ours, 2) == published["bart-large"] == 48.56


@pytest.mark.parametrize("part", ["all", "seen", "unseen"])
@pytest.mark.parametrize("system", ["t5-small", "bart-base"])
def test_webnlg(system: str, part: str):
    path = folder("research_only/metric_refs/webnlg2017")
    references = [path / "refs_tok_lower" / f"{part}.ref{number}" for number in range(3)]
    published = json.loads((path / "scores.json").read_text(encoding="utf-8"))["published"][system][part]
    assert round(scored("webnlg_bleu", path / "outputs" / f"webnlg-{part}-{system}.txt", *references), 2) == published


@pytest.mark.slow
@pytest.mark.parametrize("stemming", [False, True], ids=["plain", "stem"])
@pytest.mark.parametrize("kind", ["1", "2", "l"])
def test_xsum(kind: str, stemming: bool):
    """To four digits of ``rouge_score``'s own values; ROUGE-1.5.5 published 29.70 / 9.21 / 23.24 for this system."""
    path = folder("metric_refs/xsum")
    expected = json.loads((path / "expected_rouge_score.json").read_text(encoding="utf-8"))["scores"]
    metric = f"rouge_score_{kind}{'_stem' if stemming else ''}"
    ours = scored(metric, path / "ptgen-test-output.txt", path / "gold-test-sentences.txt")
    assert round(ours, 4) == expected[f"ptgen/stem={stemming}"][f"rouge{kind.upper()}"][2]
