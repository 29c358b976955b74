"""BERTScore, MoverScore and BLEURT: optional, each with a package and a model of its own that is never bundled.

Their numbers depend on the model, so the model's name belongs into every report. One that is not there raises
:class:`~softprompts.errors.MissingExtraError` with the package and the model to get.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from softprompts.errors import MissingExtraError
from softprompts.evaluation.scorers.base import FloatArray, Metric, native_mean, register
from softprompts.evaluation.scorers.java import missing_package

__all__: list[str] = []

_BLEURT_VARIABLE = "BLEURT_CHECKPOINT"


def _guarded(name: str, model: str, run: Callable[[], Any]) -> Any:
    """Run what loads a model; these packages fail in many ways when it is not there."""
    try:
        return run()
    except Exception as error:
        raise MissingExtraError(f"{name} could not load its model ({model}): {error}") from error


def _rows(values: Sequence[float]) -> FloatArray:
    return np.array([[float(value), 1.0] for value in values])


def _bert_score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
    """Per record F1 against the best reference, not rescaled."""

    def run() -> Any:
        scorer = importlib.import_module("bert_score").BERTScorer(lang="en")
        return scorer.score(list(predictions), [list(texts) for texts in references])[2]

    return _rows(_guarded("BERTScore", "roberta-large, from the Hugging Face hub", run))


def _mover_score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
    """Per record against its first reference, as DART's script."""

    def run() -> Any:
        module = importlib.import_module("moverscore_v2")
        firsts = [texts[0] for texts in references]
        weights = module.get_idf_dict(firsts), module.get_idf_dict(list(predictions))
        return module.word_mover_score(firsts, list(predictions), *weights, stop_words=[], n_gram=1)

    return _rows(_guarded("MoverScore", "distilbert-base-uncased, from the Hugging Face hub", run))


def _bleurt(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
    """Per record against its first reference, as DART's script."""
    place = os.environ[_BLEURT_VARIABLE]

    def run() -> Any:
        scorer = importlib.import_module("bleurt.score").BleurtScorer(place)
        return scorer.score(references=[texts[0] for texts in references], candidates=list(predictions))

    return _rows(_guarded("BLEURT", f"the checkpoint in '{place}'", run))


def _missing_bleurt() -> str:
    if importlib.util.find_spec("bleurt") is None:
        return "the package bleurt is not installed (pip install git+https://github.com/google-research/bleurt)"
    return "" if os.environ.get(_BLEURT_VARIABLE) else f"{_BLEURT_VARIABLE} does not name a folder with a checkpoint"


register(
    Metric(
        "bert_score",
        "BERTScore F1 with roberta-large, not rescaled, times 100, best reference",
        _bert_score,
        missing=functools.partial(missing_package, "bert_score"),
    )
)
register(
    Metric(
        "mover_score",
        "MoverScore (moverscore_v2, distilbert-base-uncased), first reference",
        _mover_score,
        native_mean,
        scale="native",
        missing=functools.partial(missing_package, "moverscore_v2", "pip install moverscore"),
    )
)
register(
    Metric(
        "bleurt",
        "BLEURT with the checkpoint that BLEURT_CHECKPOINT names, first reference",
        _bleurt,
        native_mean,
        scale="native",
        missing=_missing_bleurt,
    )
)
