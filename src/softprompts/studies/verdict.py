"""What a study says about a claim: reproduced in direction, not, or undecided.

The rule, which every report prints (:data:`RULE`). A check compares the mean over some settings with the mean over
others. Its difference has a 95 % confidence interval from the seeds: settings vary independently of each other
(Welch; the degrees of freedom by Satterthwaite), metrics of one setting are first combined seed by seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from softprompts.evaluation.scorers import METRICS
from softprompts.studies.definition import Check, Claim

__all__ = ["RULE", "Difference", "Outcome", "Values", "Verdict", "difference_of", "higher_is_better", "judge", "t_95"]

RULE = (
    "A claim is split into comparisons between settings, each the difference of two means over the seeds with its 95 % "
    "confidence interval (Student's t; Welch-Satterthwaite where settings differ). A comparison holds if the whole "
    "interval is on the claimed side of zero, fails if it is on the other side, and is undecided if the "
    "interval contains zero. A claim of equality holds if the whole interval is within the stated margin, fails if it "
    "is wholly outside, and is undecided otherwise. The claim is reproduced in direction if all of its comparisons "
    "hold, not reproduced if one fails, undecided otherwise; not measured if a setting has fewer than two seeds. With "
    "few seeds only large differences are decided; nothing is corrected for the number of comparisons, nor for seeds "
    "that were added after a first look."
)

Outcome = Literal["reproduced in direction", "not reproduced", "undecided", "not measured"]

Values = Mapping[str, Mapping[str, Mapping[int, float]]]
"""By setting, metric and seed."""

_T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t, two-sided 95 %, for 1 to 30 degrees of freedom."""


@dataclass(frozen=True)
class Difference:
    """What one check found, in the metric's unit; positive is what the check says."""

    words: str
    mean: float | None
    low: float | None
    high: float | None
    outcome: Outcome


@dataclass(frozen=True)
class Verdict:
    """What a study says about one claim."""

    claim: Claim
    outcome: Outcome
    differences: tuple[Difference, ...]


def t_95(degrees: float) -> float:
    """Two-sided 95 % quantile of Student's t; a fraction of a degree is left out, which widens the interval."""
    whole = max(1, math.floor(degrees + 1e-9))
    if whole <= len(_T_95):
        return _T_95[whole - 1]
    z = 1.959964  # Cornish-Fisher; exact to three digits from 30 degrees on
    return z + (z**3 + z) / (4 * whole) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * whole**2)


def higher_is_better(metric: str) -> bool:
    """Whether more of it is better: so say the metrics themselves; of losses, times and sizes less is better."""
    plain = metric.rpartition("/")[2]
    if plain in METRICS:
        return METRICS.get(plain).higher_is_better
    lower = ("loss", "perplexity", "illegal", "seconds", "step", "parameters", "bytes", "none", "transferred", "own")
    return not any(word in plain for word in lower)


def difference_of(check: Check, values: Values, main_metric: str) -> Difference:
    """Compare the settings of one check."""
    metric = check.metric or main_metric
    terms = [*_terms(check.better, metric, 1.0), *_terms(check.than, metric, -1.0)]
    sign = "=" if check.within is not None else ">" if higher_is_better(terms[0][1]) else "<"
    words = f"{' + '.join(check.better)} {sign} {' + '.join(check.than)}"
    if not any(":" in name for name in check.better):
        words = f"{metric}: {words}"
    words += f" (± {check.within:g})" if check.within is not None else ""
    per_setting: dict[str, list[float]] = {}
    for setting in dict.fromkeys(term[0] for term in terms):
        own = [(name, weight) for place, name, weight in terms if place == setting]
        known = [values.get(setting, {}).get(name, {}) for name, _ in own]
        seeds = sorted(set(known[0]).intersection(*known[1:]))
        if len(seeds) < 2:
            return Difference(words, None, None, None, "not measured")
        per_setting[setting] = [
            sum(weight * found[seed] for (_, weight), found in zip(own, known, strict=True)) for seed in seeds
        ]
    mean, half = _interval(list(per_setting.values()))
    if check.within is None and not higher_is_better(terms[0][1]):
        mean = -mean
    low, high = mean - half, mean + half
    return Difference(words, mean, low, high, _outcome(low, high, check.within))


def _terms(names: Sequence[str], metric: str, sign: float) -> list[tuple[str, str, float]]:
    """Setting, metric and weight of each entry of one side."""
    parts = [name.partition(":") for name in names]
    return [(setting, own or metric, sign / len(names)) for setting, _, own in parts]


def _interval(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Sum of the groups' means, and half of its 95 % interval."""
    mean = sum(statistics.fmean(group) for group in groups)
    parts = [(statistics.variance(group) / len(group), len(group) - 1) for group in groups]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return mean, 0.0
    degrees = variance**2 / sum(part**2 / own for part, own in parts)
    return mean, t_95(degrees) * math.sqrt(variance)


def _outcome(low: float, high: float, within: float | None) -> Outcome:
    if within is not None:
        if -within <= low and high <= within:
            return "reproduced in direction"
        return "not reproduced" if low > within or high < -within else "undecided"
    if low > 0:
        return "reproduced in direction"
    return "not reproduced" if high < 0 else "undecided"


def judge(claim: Claim, values: Values, main_metric: str, checks: Sequence[Check] | None = None) -> Verdict:
    """Apply the rule to one claim.

    Args:
        claim: What a paper says.
        values: What was measured.
        main_metric: For checks that name none.
        checks: How it is tested here; ``None`` takes the claim's own.
    """
    asked = claim.checks if checks is None else checks
    differences = tuple(difference_of(check, values, main_metric) for check in asked)
    found = {one.outcome for one in differences}
    order: tuple[Outcome, ...] = ("not reproduced", "not measured", "undecided", "reproduced in direction")
    outcome = next(one for one in order if one in found)
    return Verdict(claim, outcome, differences)
