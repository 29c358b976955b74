"""What a metric is, and the table of all of them.

A metric is two functions: ``statistics`` turns records into sufficient statistics, one row ``[S]`` per record, and
``aggregate`` turns *sums* of rows into scores. The score of a corpus is ``aggregate(rows.sum())``. Everything that
resamples records (bootstrap, randomization) works on the rows alone, so no text is scored twice.

To add a metric, write both functions in a file of this folder, call :func:`register`, and name the file in
:mod:`softprompts.evaluation.scorers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from softprompts.registry import Registry

__all__ = ["METRICS", "FloatArray", "Metric", "Statistics", "averaged", "mean", "native_mean", "prepared", "register"]

FloatArray = NDArray[np.float64]
"""Statistics and scores."""

Statistics = Callable[[Sequence[str], Sequence[Sequence[str]]], FloatArray]
"""``statistics(predictions, references)``: sufficient statistics [N, S] of N records."""


def mean(sums_RS: FloatArray) -> FloatArray:
    """Aggregate rows ``[value, 1]`` to 100 times their mean: for metrics that are averages over records."""
    return 100.0 * native_mean(sums_RS)


def native_mean(sums_RS: FloatArray) -> FloatArray:
    """Aggregate rows ``[value, 1]`` to their mean, on the metric's own scale."""
    return np.asarray(sums_RS[:, 0] / sums_RS[:, 1])


def _nothing_missing() -> str:
    return ""


@dataclass(frozen=True)
class Metric:
    """One way to score a corpus."""

    name: str
    description: str
    """What exactly is computed, by which tool's definition."""
    statistics: Statistics
    aggregate: Callable[[FloatArray], FloatArray] = mean
    """Sums [R, S] to scores [R]."""
    higher_is_better: bool = True
    scale: str = "0-100"
    """``"0-100"`` for percentages, ``"native"`` for metrics with a scale of their own (NIST, CIDEr)."""
    missing: Callable[[], str] = _nothing_missing
    """Says what has to be installed before the metric can be used; an empty text when all is there."""
    start: Callable[[], object] | None = None
    """Starts what takes a while to start (a Java process), without waiting for it."""
    all_of_group: bool = False
    """A group of records is right only if all of them are; otherwise the rows of a group are added up."""


METRICS: Registry[Metric] = Registry("metric")


def register(metric: Metric) -> Metric:
    """Enter a metric into the table under its own name and return it."""
    return METRICS.register(metric.name)(metric)


def averaged(one: Callable[[str, Sequence[str]], float]) -> Statistics:
    """Statistics ``[value, 1]`` for :func:`mean` from a function of one record."""

    def statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
        return np.array([[one(text, refs), 1.0] for text, refs in zip(predictions, references, strict=True)])

    return statistics


def prepared(statistics: Statistics, prepare: Callable[[str], str]) -> Statistics:
    """Apply ``prepare`` to every text before ``statistics`` sees it."""

    def after(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
        return statistics(
            [prepare(text) for text in predictions], [[prepare(t) for t in texts] for texts in references]
        )

    return after
