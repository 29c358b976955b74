"""TER (Snover et al. 2006) and chrF (Popović 2015) by sacreBLEU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER

from softprompts.evaluation.scorers.base import FloatArray, Metric, prepared, register
from softprompts.evaluation.scorers.bleu import webnlg_tokens

__all__: list[str] = []

_CHAR_ORDER = 6


def _ter_statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
    """Per record: edits to the nearest reference, average words of the references."""
    ter = TER()
    results = [ter.sentence_score(text, list(refs)) for text, refs in zip(predictions, references, strict=True)]
    return np.array([[result.num_edits, result.ref_length] for result in results], dtype=np.float64)


def _ter(sums_RS: FloatArray) -> FloatArray:
    edits, length = sums_RS[:, 0], sums_RS[:, 1]
    # Without any reference word each edit is an error, as in tercom.
    return 100.0 * np.where(length > 0, edits / np.where(length > 0, length, 1.0), np.minimum(edits, 1.0))


def _chrf_statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
    """Per record, against its best reference: characters n-grams of prediction, reference, both; for n = 1..6."""
    chrf = CHRF()
    rows = []
    for text, refs in zip(predictions, references, strict=True):
        rows += chrf._extract_corpus_statistics([text], [[one] for one in refs])  # sacreBLEU shows only the score
    return np.asarray(rows, dtype=np.float64)


def _chrf(sums_RS: FloatArray, beta: float = 2.0) -> FloatArray:
    """F score of the averages over the orders that occur, as sacreBLEU without its "eps" smoothing."""
    triples = sums_RS.reshape(len(sums_RS), _CHAR_ORDER, 3)
    predicted, referred, both = triples[..., 0], triples[..., 1], triples[..., 2]
    counted = ((predicted > 0) & (referred > 0)).sum(axis=1)
    orders = np.maximum(counted, 1)
    occurs = (predicted > 0) & (referred > 0)
    precision = np.where(occurs, both / np.maximum(predicted, 1.0), 0.0).sum(axis=1) / orders
    recall = np.where(occurs, both / np.maximum(referred, 1.0), 0.0).sum(axis=1) / orders
    weighted = beta**2 * precision + recall
    return np.asarray(100.0 * (1 + beta**2) * precision * recall / np.where(weighted > 0, weighted, 1.0))


_edits = partial(Metric, aggregate=_ter, higher_is_better=False)

register(_edits("ter", "TER, sacreBLEU's port of tercom 0.7.25: words between blanks, lower-cased", _ter_statistics))
register(
    _edits(
        "webnlg_ter",
        "TER as `ter`, behind the tokenization of WebNLG 2017's scripts",
        prepared(_ter_statistics, webnlg_tokens),
    )
)
register(Metric("chrf", "chrF2 of sacreBLEU: character 6-grams, no word n-grams", _chrf_statistics, _chrf))
