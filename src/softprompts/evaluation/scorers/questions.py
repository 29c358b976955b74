"""Exact match and F1 of answers in words, as the official scripts of SQuAD 1.1, MRQA and ReCoRD compute them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from softprompts.evaluation.scorers.base import Metric, averaged, register

__all__ = ["normal_answer"]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normal_answer(text: str) -> str:
    """Lower-case; drop punctuation, then articles, then superfluous blanks (``normalize_answer`` of SQuAD's script)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _exact(prediction: str, references: Sequence[str]) -> float:
    return float(any(normal_answer(prediction) == normal_answer(reference) for reference in references))


def _overlap(prediction: str, reference: str) -> float:
    predicted, real = normal_answer(prediction).split(), normal_answer(reference).split()
    both = (Counter(predicted) & Counter(real)).total()
    if not both:
        return 0.0
    precision, recall = both / len(predicted), both / len(real)
    return 2 * precision * recall / (precision + recall)


def _f1(prediction: str, references: Sequence[str]) -> float:
    return max(_overlap(prediction, reference) for reference in references)


register(
    Metric(
        "squad_em",
        "exact match of SQuAD 1.1 (MRQA, ReCoRD): lower case, no punctuation, no articles; best reference",
        averaged(_exact),
    )
)
register(
    Metric("squad_f1", "F1 over words of SQuAD 1.1 (MRQA, ReCoRD): normalized likewise; best reference", averaged(_f1))
)
