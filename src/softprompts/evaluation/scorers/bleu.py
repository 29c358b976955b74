"""BLEU (Papineni et al. 2002) by sacreBLEU, in the variants that the benchmarks' official scripts compute."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU

from softprompts.evaluation.scorers.base import FloatArray, Metric, Statistics, register

__all__ = ["webnlg_tokens"]

_ORDER = 4
_NON_WORD = re.compile(r"([^\w\u0307])")
"""Non-word characters, but for the dot that a lower-cased "İ" leaves behind: tokenizing twice changes nothing."""

_WEBNLG_REFERENCES = 3
"""WebNLG's script takes at most this many."""


def webnlg_tokens(text: str) -> str:
    r"""Tokenize as WebNLG 2017's scripts: ``re.split(r"(\W)")``, lower case; accents stay."""
    return " ".join(" ".join(_NON_WORD.split(text)).lower().split())


def _statistics(tokenize: str, *, lowercase: bool = False) -> Statistics:
    def statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
        """Per record: prediction length, closest reference length, matches of 1..4-grams, numbers of 1..4-grams."""
        # The effective order and the warning about tokenized text matter to sacreBLEU's own scores only.
        bleu = BLEU(lowercase=lowercase, tokenize=tokenize, effective_order=True, force=True)
        rows = []
        for prediction, texts in zip(predictions, references, strict=True):
            result = bleu.sentence_score(prediction, list(texts))
            rows.append([result.sys_len, result.ref_len, *result.counts, *result.totals])
        return np.asarray(rows, dtype=np.float64)

    return statistics


def _parallel_statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
    """Statistics as of multi-bleu.perl, which reads parallel files of references.

    A record with fewer references than others has empty lines in them. They match nothing, but the script takes them
    for references of length 0: where the prediction is nearer to that than to the others, it costs no brevity penalty.
    """
    rows_NS = _statistics("none")(predictions, references)
    numbers_N = np.array([len(texts) for texts in references])
    length_N, reference_N = rows_NS[:, 0], rows_NS[:, 1]
    nearer_N = length_N <= np.abs(length_N - reference_N)
    rows_NS[:, 1] = np.where((numbers_N < numbers_N.max()) & nearer_N, 0.0, reference_N)
    return rows_NS


def _webnlg_statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
    outputs = [webnlg_tokens(text) for text in predictions]
    texts = [[webnlg_tokens(text) for text in many[:_WEBNLG_REFERENCES]] for many in references]
    return _parallel_statistics(outputs, texts)


def _smoothed(sums_RS: FloatArray) -> FloatArray:
    """Corpus BLEU from summed statistics, as sacreBLEU's ``compute_bleu`` with its default "exp" smoothing."""
    matches, totals = sums_RS[:, 2 : 2 + _ORDER], sums_RS[:, 2 + _ORDER :]
    # Each order without a match counts as half a match, then a quarter, ...
    halvings = np.cumsum((matches == 0) & (totals > 0), axis=1)
    return _bleu(sums_RS, np.where(matches == 0, 0.5**halvings, matches), np.asarray((matches > 0).any(axis=1)))


def _unsmoothed(sums_RS: FloatArray) -> FloatArray:
    """Corpus BLEU as multi-bleu.perl has it: zero as soon as one order has no match."""
    matches = sums_RS[:, 2 : 2 + _ORDER]
    return _bleu(sums_RS, np.maximum(matches, 1.0), np.asarray((matches > 0).all(axis=1)))


def _bleu(sums_RS: FloatArray, matches: FloatArray, defined: NDArray[np.bool_]) -> FloatArray:
    length, reference_length, totals = sums_RS[:, 0], sums_RS[:, 1], sums_RS[:, 2 + _ORDER :]
    log_precisions = np.log(matches / np.where(totals > 0, totals, 1.0)).mean(axis=1)
    brevity = np.where(length < reference_length, 1.0 - reference_length / np.maximum(length, 1.0), 0.0)
    return np.where(defined & (totals > 0).all(axis=1), 100.0 * np.exp(log_precisions + brevity), 0.0)


register(Metric("bleu", "sacreBLEU, 13a tokenization, cased, multi-reference", _statistics("13a"), _smoothed))
register(
    Metric(
        "e2e_bleu",
        "sacreBLEU, 13a tokenization, lower-cased, multi-reference; equals BLEU of the official e2e-metrics",
        _statistics("13a", lowercase=True),
        _smoothed,
    )
)
register(
    Metric(
        "multi_bleu",
        "multi-bleu.perl: tokens are what stands between blanks, cased, multi-reference; DART's official BLEU",
        _parallel_statistics,
        _unsmoothed,
    )
)
register(
    Metric(
        "webnlg_bleu",
        "multi-bleu.perl -lc behind the tokenization of WebNLG 2017's scripts (split at non-word characters), "
        "the first three references",
        _webnlg_statistics,
        _unsmoothed,
    )
)
