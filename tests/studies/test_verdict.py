"""The rule behind the verdicts, against scipy and by hand."""

from __future__ import annotations

import pytest
import scipy.stats

from softprompts.studies.definition import Check, Claim
from softprompts.studies.verdict import difference_of, higher_is_better, judge, t_95


def values(**settings: list[float]) -> dict[str, dict[str, dict[int, float]]]:
    return {name: {"bleu": dict(enumerate(own))} for name, own in settings.items()}


@pytest.mark.parametrize("degrees", [1, 2, 4, 17, 30, 31, 45, 200])
def test_quantiles_are_those_of_student(degrees: int):
    assert t_95(degrees) == pytest.approx(scipy.stats.t.ppf(0.975, degrees), abs=6e-4)


def test_a_fraction_of_a_degree_is_left_out():
    assert t_95(2.99) == t_95(2)


def test_the_interval_is_welch():
    a, b = [70.1, 71.4, 69.2, 70.8], [65.0, 68.9, 61.2, 66.6]
    found = difference_of(Check(("A",), ("B",)), values(A=a, B=b), "bleu")
    expected = scipy.stats.ttest_ind(a, b, equal_var=False)
    low, high = expected.confidence_interval(0.95)
    assert found.mean == pytest.approx(expected.statistic * (high - low) / 2 / scipy.stats.t.ppf(0.975, expected.df))
    # Ours leaves a fraction of a degree out, so it is a little wider, and not by much.
    assert found.low <= low
    assert found.high >= high
    assert found.high - found.low == pytest.approx(high - low, rel=0.12)


def test_metrics_of_one_setting_are_combined_seed_by_seed():
    seeds = [90.0, 50.0, 70.0]
    own = {
        "S": {"vote": dict(enumerate(s + 1 + 0.01 * i for i, s in enumerate(seeds))), "mean": dict(enumerate(seeds))}
    }
    found = difference_of(Check(("S:vote",), ("S:mean",)), own, "vote")
    expected = scipy.stats.ttest_1samp([1.0, 1.01, 1.02], 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(expected.low, abs=1e-3), pytest.approx(expected.high, abs=1e-3))


OUTCOMES = [
    ([50.0, 51.0, 50.5], [40.0, 41.0, 40.5], None, "reproduced in direction"),
    ([40.0, 41.0, 40.5], [50.0, 51.0, 50.5], None, "not reproduced"),
    ([50.0, 41.0, 45.5], [44.0, 47.0, 45.0], None, "undecided"),
    ([50.0, 51.0, 50.5], [50.1, 50.9, 50.4], 3.0, "reproduced in direction"),
    ([50.0, 51.0, 50.5], [40.1, 40.9, 40.4], 3.0, "not reproduced"),
    ([50.0, 51.0, 50.5], [40.1, 60.9, 50.4], 3.0, "undecided"),
    ([50.0], [40.0, 41.0], None, "not measured"),
]


@pytest.mark.parametrize(("better", "than", "within", "outcome"), OUTCOMES)
def test_outcomes(better: list[float], than: list[float], within: float | None, outcome: str):
    check = Check(("A",), ("B",), within=within)
    assert difference_of(check, values(A=better, B=than), "bleu").outcome == outcome
    assert judge(Claim("", "", (check,)), values(A=better, B=than), "bleu").outcome == outcome


def test_means_over_settings_are_compared():
    own = values(A=[10.0, 10.2], B=[30.0, 30.2], C=[5.0, 5.2], D=[7.0, 7.2])
    found = difference_of(Check(("A", "B"), ("C", "D")), own, "bleu")
    assert found.mean == pytest.approx(20.0 - 6.0)


def test_of_a_loss_less_is_better():
    own = {"A": {"loss": {0: 1.0, 1: 1.1}}, "B": {"loss": {0: 9.0, 1: 9.1}}}
    assert difference_of(Check(("A",), ("B",)), own, "loss").outcome == "reproduced in direction"
    names = ("unseen/webnlg_bleu", "webnlg_ter", "ranked/accuracy", "unseen/loss", "seconds", "illegal")
    assert [higher_is_better(name) for name in names] == [True, False, True, False, False, False]


def test_a_claim_needs_all_of_its_checks():
    own = values(A=[50.0, 50.1], B=[40.0, 40.1], C=[60.0, 60.1])
    holds, fails, unknown = Check(("A",), ("B",)), Check(("A",), ("C",)), Check(("A",), ("X",))
    assert judge(Claim("", "", (holds, fails)), own, "bleu").outcome == "not reproduced"
    assert judge(Claim("", "", (holds, unknown)), own, "bleu").outcome == "not measured"
    assert judge(Claim("", "", (holds, holds)), own, "bleu").outcome == "reproduced in direction"
