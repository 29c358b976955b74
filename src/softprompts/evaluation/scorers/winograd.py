"""Accuracy of WSC (SuperGLUE) for models that answer with a phrase instead of with true or false, as T5 judges them."""

from __future__ import annotations

from collections.abc import Sequence

from softprompts.errors import DataError
from softprompts.evaluation.scorers.base import Metric, averaged, register

__all__ = ["same_phrase"]

_DETERMINER_WORDS = "a an few her his each every many much my our some that the their these this those which whose your"
_DETERMINERS = frozenset(_DETERMINER_WORDS.split())


def same_phrase(prediction: str, phrase: str) -> bool:
    """Whether two phrases mean the same: one's words are among the other's, case and determiners aside.

    ``Bob`` and ``Bob's hat`` do not: either both have an apostrophe or none (T5's postprocessor ``wsc_simple``).
    """
    ours, theirs = _clean(prediction), _clean(phrase)
    first, second = set(ours.split()), set(theirs.split())
    return ("'" in ours) == ("'" in theirs) and (first <= second or second <= first)


def _clean(text: str) -> str:
    return " ".join(word for word in text.strip().lower().split() if word not in _DETERMINERS)


def _right(prediction: str, references: Sequence[str]) -> float:
    label, *phrases = references
    if label not in ("True", "False") or len(phrases) != 1:
        raise DataError(f"the references of a WSC record are {list(references)}, expected a label and a phrase")
    if not _clean(prediction):  # no phrase at all: wrong, also where another phrase than the record's is wanted
        return 0.0
    return float(same_phrase(prediction, phrases[0]) == (label == "True"))


register(
    Metric(
        "wsc_accuracy",
        "WSC: the predicted phrase is the record's just where its label is True; as T5's postprocessor compares them",
        averaged(_right),
    )
)
