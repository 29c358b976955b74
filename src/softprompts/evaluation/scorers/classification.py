"""Scores of labels: accuracy, F1 of one class, macro F1, Matthews correlation. A label is compared as exact text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from softprompts.errors import DataError
from softprompts.evaluation.scorers.base import FloatArray, Metric, averaged, register

__all__ = ["NEGATIVE_LABELS", "POSITIVE_LABELS"]

POSITIVE_LABELS = frozenset({"true", "yes", "1", "positive", "equivalent", "duplicate", "entailment", "acceptable"})
NEGATIVE_LABELS = frozenset(
    {"false", "no", "0", "negative", "not_equivalent", "not_duplicate", "not_entailment", "unacceptable"}
)
"""Which class is "the positive one" of F1 is known by its name, in any case."""


def _normal(text: str) -> str:
    return " ".join(text.split())


def _exact(prediction: str, references: Sequence[str]) -> float:
    return float(any(_normal(prediction) == _normal(reference) for reference in references))


def _labels(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[str], list[str]]:
    for number, texts in enumerate(references):
        if len(set(texts)) > 1:
            raise DataError(f"record {number} has the labels {list(texts)}; this metric needs exactly one right answer")
    return [_normal(text) for text in predictions], [_normal(texts[0]) for texts in references]


def _f1_statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
    """Per record, of the positive class: true positives, predicted, real.

    What is no label at all counts as the wrong one (T5's ``f1_score_with_invalid``), or saying nothing would be a way
    of saying no.
    """
    predicted, real = _labels(predictions, references)
    unknown = next((label for label in real if label.lower() not in POSITIVE_LABELS | NEGATIVE_LABELS), None)
    if unknown is not None:
        raise DataError(
            f"F1 cannot tell whether the label '{unknown}' is the positive class; known labels are "
            f"{', '.join(sorted(POSITIVE_LABELS))} and {', '.join(sorted(NEGATIVE_LABELS))} (macro_f1 takes any)"
        )
    rows = []
    for one, right in zip(predicted, real, strict=True):
        is_positive = right.lower() in POSITIVE_LABELS
        legal = one.lower() in POSITIVE_LABELS | NEGATIVE_LABELS
        positive = one.lower() in POSITIVE_LABELS if legal else not is_positive
        rows.append([positive and is_positive and one == right, positive, is_positive])
    return np.asarray(rows, dtype=np.float64)


def _f1(sums_RS: FloatArray) -> FloatArray:
    both, predicted, real = sums_RS[:, 0], sums_RS[:, 1], sums_RS[:, 2]
    return 100.0 * 2 * both / np.maximum(predicted + real, 1.0)


def _macro_statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
    """Per record: one-hot of the hit class, of the predicted class, of the real class; classes of the references."""
    predicted, real = _labels(predictions, references)
    classes = np.array(sorted(set(real)))
    predicted_NC = np.array(predicted)[:, None] == classes
    real_NC = np.array(real)[:, None] == classes
    return np.concatenate([predicted_NC & real_NC, predicted_NC, real_NC], axis=1).astype(np.float64)


def _macro_f1(sums_RS: FloatArray) -> FloatArray:
    """Mean of the classes' F1; a class that neither occurs nor is predicted (in a resample) is left out."""
    both, predicted, real = np.split(sums_RS, 3, axis=1)
    present = (predicted + real) > 0
    f1 = 2 * both / np.where(present, predicted + real, 1.0)
    return np.asarray(100.0 * f1.sum(axis=1) / np.maximum(present.sum(axis=1), 1))


def _matthews_statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
    """Per record: right or not, 1, one-hot of the predicted class, one-hot of the real class.

    The classes are the references' ones, and one more for everything else that is predicted. So two systems have the
    same columns.
    """
    predicted, real = _labels(predictions, references)
    classes = np.array([*sorted(set(real)), "\0"])
    known = set(real)
    predicted_NC = np.array([one if one in known else "\0" for one in predicted])[:, None] == classes
    real_NC = np.array(real)[:, None] == classes
    right = (np.array(predicted) == np.array(real))[:, None]
    return np.concatenate([right, np.ones_like(right), predicted_NC, real_NC], axis=1).astype(np.float64)


def _matthews(sums_RS: FloatArray) -> FloatArray:
    """Matthews correlation of any number of classes (Gorodkin 2004); 0 where one side has only one class."""
    right, total = sums_RS[:, 0], sums_RS[:, 1]
    predicted, real = np.split(sums_RS[:, 2:], 2, axis=1)
    covariance = right * total - (predicted * real).sum(axis=1)
    spread = (total**2 - (predicted**2).sum(axis=1)) * (total**2 - (real**2).sum(axis=1))
    return 100.0 * np.where(spread > 0, covariance / np.sqrt(np.where(spread > 0, spread, 1.0)), 0.0)


register(Metric("exact_match", "equal to one of the references, runs of blanks made one", averaged(_exact)))
register(Metric("accuracy", "classification: the answer is the right one (as exact_match)", averaged(_exact)))
register(
    Metric(
        "f1",
        "F1 of the positive class, what is no label counts as the wrong one; over answers, not questions, for MultiRC",
        _f1_statistics,
        _f1,
    )
)
register(
    Metric(
        "macro_f1",
        "mean F1 of the references' classes; a prediction outside them is wrong and no class of its own",
        _macro_statistics,
        _macro_f1,
    )
)
register(
    Metric("matthews", "Matthews correlation, times 100, of any number of classes", _matthews_statistics, _matthews)
)
register(
    Metric(
        "group_exact_match",
        "groups of records whose answers are all right (MultiRC: questions with every answer judged rightly)",
        averaged(_exact),
        all_of_group=True,
    )
)
