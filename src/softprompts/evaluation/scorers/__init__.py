"""The metrics, one file per family; importing this package fills the table ``METRICS``."""

from softprompts.evaluation.scorers import (
    bleu,
    caption,
    classification,
    edits,
    meteor,
    neural,
    nist,
    questions,
    rouge,
    winograd,
)
from softprompts.evaluation.scorers.base import METRICS, Metric

__all__ = [
    "METRICS",
    "Metric",
    "bleu",
    "caption",
    "classification",
    "edits",
    "meteor",
    "neural",
    "nist",
    "questions",
    "rouge",
    "winograd",
]
