"""ROUGE-L and CIDEr as in coco-caption (Chen et al. 2015), which the official E2E scripts use.

Scores by ``pycocoevalcap``; texts pass through its tokenizer first (Stanford's PTBTokenizer, lower-cased, punctuation
removed), a Java program. Its grammar has no equal in Python: NLTK's Treebank tokenizer differs on quotes, ellipses,
abbreviations and numbers, so without Java these metrics are left out and not approximated.
"""

from __future__ import annotations

import functools
import importlib
import subprocess
from collections.abc import Sequence

import numpy as np

from softprompts.errors import DataError
from softprompts.evaluation.scorers.base import FloatArray, Metric, averaged, native_mean, register
from softprompts.evaluation.scorers.java import TOKENIZER_JAR, command, missing_java

__all__ = ["one_line", "ptb_tokenized"]

_PUNCTUATION = frozenset(["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", *".?!,:-;", "--", "..."])
"""What coco-caption removes. It compares lower-cased tokens with these, so brackets in fact stay ("-lrb-")."""

_KEPT_TEXTS = 8
"""Corpora whose tokens are remembered: three metrics ask for the same ones, for one or two systems."""


def one_line(text: str) -> str:
    """Make every kind of line break a blank: programs that read lines must not see two."""
    return " ".join(text.splitlines())


def ptb_tokenized(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Tokenize a corpus as coco-caption does: tokens joined by blanks, lower case, no punctuation.

    Raises:
        MissingExtraError: Java or the package ``pycocoevalcap`` is not there.
        DataError: The tokenizer failed.
    """
    outputs = list(_tokenize(tuple(map(one_line, predictions))))
    flat = iter(_tokenize(tuple(one_line(text) for texts in references for text in texts)))
    return outputs, [[next(flat) for _ in texts] for texts in references]


@functools.lru_cache(maxsize=_KEPT_TEXTS)
def _tokenize(lines: tuple[str, ...]) -> tuple[str, ...]:
    arguments = ("edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding", "UTF-8")
    done = subprocess.run(
        command(TOKENIZER_JAR, *arguments), input="\n".join(lines) + "\n", capture_output=True, encoding="utf-8"
    )
    found = done.stdout.removesuffix("\n").split("\n")
    if done.returncode or len(found) != len(lines):
        raise DataError(
            f"the PTB tokenizer gave {len(found)} lines for {len(lines)} texts (exit code {done.returncode}): "
            f"{done.stderr.strip()[-300:] or 'it said nothing'}"
        )
    return tuple(" ".join(word for word in line.split(" ") if word not in _PUNCTUATION) for line in found)


def _rouge_statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
    rouge = importlib.import_module("pycocoevalcap.rouge.rouge").Rouge()
    outputs, texts = ptb_tokenized(predictions, references)
    return averaged(lambda output, many: float(rouge.calc_score([output], list(many))))(outputs, texts)


def _cider_statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
    """Per record CIDEr-D and 1. Document frequencies are those of all records' references, also in resamples."""
    scorer = importlib.import_module("pycocoevalcap.cider.cider_scorer").CiderScorer(n=4, sigma=6.0)
    for output, texts in zip(*ptb_tokenized(predictions, references), strict=True):
        scorer += (output, texts)
    scorer.compute_doc_freq()
    return np.array([[value, 1.0] for value in scorer.compute_cider()], dtype=np.float64)


register(
    Metric(
        "rouge_l",
        "ROUGE-L of coco-caption (beta 1.2, best precision and best recall of the references); equals ROUGE-L of the "
        "official e2e-metrics",
        _rouge_statistics,
        missing=missing_java,
    )
)
register(
    Metric(
        "cider",
        "CIDEr-D of coco-caption; equals CIDEr of the official e2e-metrics",
        _cider_statistics,
        native_mean,
        scale="native",
        missing=missing_java,
    )
)
