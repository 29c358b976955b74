"""NIST (Doddington 2002) as the mteval script of the official e2e-metrics computes it.

No kept library agrees with it: NLTK takes each segment's best reference where mteval pools them. Where records have
different numbers of references, the script's average reference length is the mean over *all references* of the
corpus (a mean per record first would be 0.2 % to 6 % off on E2E).

The information of an n-gram comes from the references of the whole corpus. Resamples keep it, as they keep the
references themselves: that is what makes a record's row independent of the other records in the resample.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from softprompts.evaluation.scorers.base import FloatArray, Metric, register

__all__: list[str] = []

_ORDER = 5
_BETA = -math.log(0.5) / math.log(1.5) ** 2
"""Makes the brevity penalty 0.5 where the prediction has two thirds of the references' length."""

_Grams = Counter[tuple[str, ...]]


def _grams(words: Sequence[str], order: int) -> _Grams:
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def _statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
    """Per record: information of matches and numbers of 1..5-grams, words and number of references, 1."""
    tokenize: Callable[[str], str] = Tokenizer13a()  # type: ignore[no-untyped-call]
    outputs = [tokenize(text).lower().split() for text in predictions]
    texts = [[tokenize(text).lower().split() for text in many] for many in references]
    counts: _Grams = Counter()
    for many in texts:
        for words in many:
            counts[()] += len(words)
            for order in range(1, _ORDER + 1):
                counts.update(_grams(words, order))
    rows = []
    for output, many in zip(outputs, texts, strict=True):
        information, numbers = [], []
        for order in range(1, _ORDER + 1):
            pooled: _Grams = Counter()
            for words in many:
                pooled |= _grams(words, order)  # the most that any one reference has
            matches = _grams(output, order) & pooled
            information.append(sum(number * math.log2(counts[g[:-1]] / counts[g]) for g, number in matches.items()))
            numbers.append(max(len(output) - order + 1, 0))
        rows.append([*information, *numbers, sum(map(len, many)), len(many), 1.0])
    return np.asarray(rows, dtype=np.float64)


def _nist(sums_RS: FloatArray) -> FloatArray:
    information, numbers = sums_RS[:, :_ORDER], sums_RS[:, _ORDER : 2 * _ORDER]
    words, references, records = sums_RS[:, 2 * _ORDER], sums_RS[:, 2 * _ORDER + 1], sums_RS[:, 2 * _ORDER + 2]
    gain = (information / np.maximum(numbers, 1.0)).sum(axis=1)
    reference_length = np.maximum(words / references * records, 1e-9)
    ratio = np.clip(numbers[:, 0] / reference_length, 1e-9, 1.0)
    return np.asarray(gain * np.exp(-_BETA * np.log(ratio) ** 2))


register(
    Metric(
        "nist",
        "NIST, 5-grams, lower-cased, mteval-v13a tokenization; equals NIST of the official e2e-metrics",
        _statistics,
        _nist,
        scale="native",
    )
)
