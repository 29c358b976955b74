"""The metrics, one file per family; importing this package fills the table ``METRICS`` of its module ``base``."""

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

__all__ = ["bleu", "caption", "classification", "edits", "meteor", "neural", "nist", "questions", "rouge", "winograd"]
