"""What classification is judged by beside its metrics: answers that are no label at all, and the majority class.

A model that writes its answer can write anything. In the prompt-tuning paper (Lester et al. 2021, section 3.2) models
of middling size score nothing for want of a legal label; that is told apart from labels that are wrong. And a score
means little before it is held against that of the class that is named most often.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from softprompts.errors import DataError
from softprompts.evaluation.metrics import score_all
from softprompts.types import Example, MetricValue, Prediction

__all__ = ["ILLEGAL", "MAJORITY", "RANKED", "IllegalAnswers", "Majority", "illegal_answers", "is_legal", "majority_of"]

RANKED, MAJORITY = "ranked/", "majority/"
"""In front of a metric's name: that of the likeliest choices, and that of the majority class."""
ILLEGAL = "illegal"
"""Name of the share of generated answers that are no label."""
_SHOWN = 5


def is_legal(text: str, choices: Sequence[str]) -> bool:
    """Whether an answer is one of the label words, runs of blanks made one."""
    return " ".join(text.split()) in {" ".join(choice.split()) for choice in choices}


@dataclass(frozen=True)
class IllegalAnswers:
    """Generated answers that are none of their example's choices."""

    count: int
    records: int
    commonest: tuple[tuple[str, int], ...]
    """Texts and how often each was said, at most five."""

    @property
    def share(self) -> MetricValue:
        """Per hundred records."""
        share = self.count / self.records
        spread = (share * (1 - share) / (self.records - 1)) ** 0.5 if self.records > 1 else None
        return MetricValue(100 * share, None if spread is None else 100 * spread, ILLEGAL)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"count": self.count, "share": self.count / self.records, "commonest": dict(self.commonest)}


def illegal_answers(predictions: Sequence[Prediction]) -> IllegalAnswers | None:
    """Count the generated answers that are no label; ``None`` where an example has no choices."""
    if not all(one.example.choices for one in predictions):
        return None
    texts = [one.text for one in predictions if not is_legal(one.text, one.example.choices)]
    return IllegalAnswers(len(texts), len(predictions), tuple(Counter(texts).most_common(_SHOWN)))


@dataclass(frozen=True)
class Majority:
    """The label that is the most common one."""

    label: str
    counted_on: str
    """The split on which labels were counted."""
    share: float
    """Of the examples there."""

    def metrics(
        self,
        names: Sequence[str],
        references: Sequence[Sequence[str]],
        *,
        resamples: int = 1000,
        seed: int = 0,
        groups: Sequence[str] | None = None,
    ) -> dict[str, MetricValue]:
        """Score this label as everybody's answer; see :func:`softprompts.evaluation.metrics.score_all`."""
        texts = [self.label] * len(references)
        return score_all(names, texts, references, resamples=resamples, seed=seed, groups=groups)

    def to_dict(self) -> Mapping[str, Any]:
        """Plain data."""
        return {"label": self.label, "counted_on": self.counted_on, "share": self.share}


def majority_of(examples: Sequence[Example], counted_on: str) -> Majority:
    """Find the most common label; of equally common ones, the first of the choices.

    Args:
        examples: Of a task whose examples all have the same choices.
        counted_on: Name of their split.

    Raises:
        DataError: There are no examples, or they have no choices.
    """
    if not examples or not examples[0].choices:
        raise DataError("a majority class needs examples with choices; got none")
    counts = Counter(example.target for example in examples)
    label = max(examples[0].choices, key=lambda choice: counts[choice])
    return Majority(label, counted_on, counts[label] / len(examples))
