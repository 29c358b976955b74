"""Scores of predictions against references, each with a bootstrap standard error.

A metric is two functions: ``statistics`` turns records into sufficient statistics, one row ``[S]`` per record, and
``aggregate`` turns *sums* of rows into scores. The score of a corpus is ``aggregate(rows.sum())``; the bootstrap
resamples records by weighting their rows, so a thousand resamples cost one matrix product and no string is scored
twice. The same seed and number of records give the same resamples for every metric, so differences can be paired.

To add a metric, write both functions and register a :class:`Metric`. All values are percentages, 0 to 100.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from softprompts.errors import ConfigError, DataError
from softprompts.registry import Registry
from softprompts.types import MetricValue

__all__ = ["METRICS", "FloatArray", "Metric", "mean", "score", "score_all"]

FloatArray = NDArray[np.float64]
"""Statistics and scores."""

_CHUNK_BYTES = 64 * 2**20
"""Memory of the resampling weights at a time."""


def mean(sums_RS: FloatArray) -> FloatArray:
    """Aggregate rows ``[value, 1]`` to 100 times their mean: for metrics that are averages over records."""
    return 100.0 * sums_RS[:, 0] / sums_RS[:, 1]


@dataclass(frozen=True)
class Metric:
    """One way to score a corpus."""

    name: str
    description: str
    """What exactly is computed, by which tool's definition."""
    statistics: Callable[[Sequence[str], Sequence[Sequence[str]]], FloatArray]
    """``statistics(predictions, references)``: sufficient statistics [N, S] of N records."""
    aggregate: Callable[[FloatArray], FloatArray] = mean
    """Sums [R, S] to scores [R]."""
    higher_is_better: bool = True


METRICS: Registry[Metric] = Registry("metric")


def _register(metric: Metric) -> Metric:
    return METRICS.register(metric.name)(metric)


def score(
    name: str,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> MetricValue:
    """Score predictions.

    Args:
        name: A name in :data:`METRICS`.
        predictions: One text per record.
        references: All acceptable texts of each record, at least one.
        resamples: Bootstrap resamples of the records; 0 leaves the standard error out.
        seed: Seed of the resampling.

    Returns:
        The value in percent and its standard error (``None`` without resampling, or for a single record).

    Raises:
        ConfigError: There is no such metric, or ``resamples`` is negative or 1.
        DataError: There are no records, a record has no reference, or the numbers of records differ.
    """
    metric = METRICS.get(name)
    if resamples < 0 or resamples == 1:
        raise ConfigError(f"resamples is {resamples}, expected 0 (no standard error) or at least 2")
    if len(predictions) != len(references):
        raise DataError(f"got {len(predictions)} predictions for {len(references)} records; expected one per record")
    if not predictions:
        raise DataError("got no predictions; a score needs at least one record")
    for number, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise DataError(f"the references of record {number} are {texts!r}, expected a list of at least one text")
    rows_NS = metric.statistics(predictions, references)
    value = float(metric.aggregate(rows_NS.sum(axis=0, keepdims=True))[0])
    if not resamples or len(predictions) == 1:
        return MetricValue(value, None, name)
    scores_R = metric.aggregate(_resample(rows_NS, resamples, seed))
    return MetricValue(value, float(scores_R.std(ddof=1)), name)


def score_all(
    names: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, MetricValue]:
    """Score by several metrics; see :func:`score`."""
    return {name: score(name, predictions, references, resamples=resamples, seed=seed) for name in names}


def _resample(rows_NS: FloatArray, resamples: int, seed: int) -> FloatArray:
    """Sums [R, S] over resamples of the rows, drawn with replacement."""
    count = len(rows_NS)
    generator = np.random.default_rng(seed)
    sums = []
    chunk = max(1, _CHUNK_BYTES // (8 * count))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        weights = [np.bincount(generator.integers(0, count, count), minlength=count) for _ in range(size)]
        sums.append(np.stack(weights).astype(np.float64) @ rows_NS)
    return np.concatenate(sums)


# --------------------------------------------------------------------------------------------------------------------
# BLEU
# --------------------------------------------------------------------------------------------------------------------

_ORDER = 4


def _bleu_statistics(lowercase: bool) -> Callable[[Sequence[str], Sequence[Sequence[str]]], FloatArray]:
    def statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
        """Per record: prediction length, closest reference length, matches of 1..4-grams, numbers of 1..4-grams."""
        bleu = BLEU(lowercase=lowercase, tokenize="13a", effective_order=True)  # the order matters to sentences only
        rows = []
        for prediction, texts in zip(predictions, references, strict=True):
            result = bleu.sentence_score(prediction, list(texts))
            rows.append([result.sys_len, result.ref_len, *result.counts, *result.totals])
        return np.asarray(rows, dtype=np.float64)

    return statistics


def _bleu(sums_RS: FloatArray) -> FloatArray:
    """Corpus BLEU from summed statistics, as sacreBLEU's ``compute_bleu`` with its default "exp" smoothing."""
    length, reference_length = sums_RS[:, 0], sums_RS[:, 1]
    matches, totals = sums_RS[:, 2 : 2 + _ORDER], sums_RS[:, 2 + _ORDER :]
    # Each order without a match counts as half a match, then a quarter, ...
    halvings = np.cumsum((matches == 0) & (totals > 0), axis=1)
    smoothed = np.where(matches == 0, 0.5**halvings, matches)
    defined = (totals > 0).all(axis=1) & (matches > 0).any(axis=1)
    log_precisions = np.log(smoothed / np.where(totals > 0, totals, 1.0)).mean(axis=1)
    brevity = np.where(length < reference_length, 1.0 - reference_length / np.maximum(length, 1.0), 0.0)
    return np.where(defined, 100.0 * np.exp(log_precisions + brevity), 0.0)


_register(Metric("bleu", "sacreBLEU, 13a tokenization, cased, multi-reference", _bleu_statistics(False), _bleu))
_register(
    Metric(
        "e2e_bleu",
        "sacreBLEU, 13a tokenization, lower-cased, multi-reference; equals BLEU of the official e2e-metrics",
        _bleu_statistics(True),
        _bleu,
    )
)


# --------------------------------------------------------------------------------------------------------------------
# Averages over records
# --------------------------------------------------------------------------------------------------------------------


def _averaged(
    one: Callable[[str, Sequence[str]], float],
) -> Callable[[Sequence[str], Sequence[Sequence[str]]], FloatArray]:
    """Statistics ``[value, 1]`` for :func:`mean` from a function of one record."""

    def statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
        return np.array([[one(text, refs), 1.0] for text, refs in zip(predictions, references, strict=True)])

    return statistics


def _exact(prediction: str, references: Sequence[str]) -> float:
    normal = " ".join(prediction.split())
    return float(any(normal == " ".join(reference.split()) for reference in references))


def _rouge_l_statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
    scorer = RougeScorer(["rougeL"], use_stemmer=False)

    def one(prediction: str, texts: Sequence[str]) -> float:
        return float(scorer.score_multi(list(texts), prediction)["rougeL"].fmeasure)

    return _averaged(one)(predictions, references)


_register(
    Metric(
        "rouge_l",
        "ROUGE-L F1 of rouge_score, no stemming, best of the references (not ROUGE-1.5.5, not coco-caption)",
        _rouge_l_statistics,
    )
)
_register(Metric("exact_match", "equal to one of the references, runs of blanks made one", _averaged(_exact)))
_register(Metric("accuracy", "classification: the answer is the right one (as exact_match)", _averaged(_exact)))
