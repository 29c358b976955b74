"""How good a prompt is on a task: metrics of its outputs, loss and perplexity of the targets, all with standard errors.

The standard error of a metric comes from a bootstrap over records (:mod:`softprompts.evaluation.metrics`). That of the
loss is clustered by record, because the tokens of one target are not independent.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from softprompts.config import DecodingConfig, to_dict
from softprompts.errors import DataError, MissingExtraError, StorageError
from softprompts.evaluation.metrics import score_all, unusable
from softprompts.evaluation.predict import predict
from softprompts.evaluation.scorers import METRICS
from softprompts.inference import Engine
from softprompts.prompted import PromptedLM
from softprompts.tasks.encode import collate
from softprompts.types import Encoded, MetricValue, Prediction, PromptStates

__all__ = ["EvaluationReport", "TargetLosses", "evaluate", "target_losses", "write_report"]

_SAMPLES_FILE, _REPORT_FILE = "samples.jsonl", "evaluation.json"


@dataclass(frozen=True)
class TargetLosses:
    """Negative log-likelihoods of the targets, in nats, one entry per record."""

    nll: tuple[float, ...]
    """Summed over the record's target, end token included."""
    tokens: tuple[int, ...]

    @property
    def loss(self) -> MetricValue:
        """Mean over tokens, with a standard error clustered by record.

        A ratio of two sums over records: its error is that of the residuals ``nll - loss * tokens`` (delta method).
        """
        total, count = sum(self.tokens), len(self.tokens)
        loss = sum(self.nll) / total
        if count < 2:
            return MetricValue(loss, None, "loss")
        residuals = [nll - loss * tokens for nll, tokens in zip(self.nll, self.tokens, strict=True)]
        spread = math.sqrt(count / (count - 1) * math.fsum(residual**2 for residual in residuals))
        return MetricValue(loss, spread / total, "loss")

    @property
    def perplexity(self) -> MetricValue:
        """``exp(loss)``; the standard error is carried over to first order."""
        loss = self.loss
        value = math.exp(loss.value) if loss.value < 700 else math.inf
        return MetricValue(value, None if loss.stderr is None else value * loss.stderr, "perplexity")


@torch.no_grad()
def target_losses(
    prompted: PromptedLM,
    rows: Sequence[Encoded],
    *,
    batch_size: int = 32,
    states: Sequence[PromptStates] | None = None,
) -> TargetLosses:
    """Measure how likely the targets are, each behind its input and its prompt.

    Args:
        prompted: The model and its prompts.
        rows: Encoded with target.
        batch_size: Rows per forward pass; it changes nothing but speed and memory.
        states: What the prompts come down to; computed here if left out.

    Raises:
        DataError: There are no rows, or one has no target.
        LengthError: A row does not fit into the context.
    """
    if not rows:
        raise DataError("there are no records to measure the loss on; expected at least one")
    without = next((row for row in rows if not row.target_ids), None)
    if without is not None:
        raise DataError(f"record '{without.example.id}' has no target; encode the records with their targets")
    frozen = prompted.frozen
    states = prompted.states() if states is None else states
    nll_N = torch.zeros(len(rows), dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda index: -rows[index].length)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = collate([rows[index] for index in indices], pad_id=frozen.pad_id).to(frozen.device)
        nll_M, _, row_M = prompted.label_losses(batch, states)
        nll_B = torch.zeros(len(indices), dtype=torch.float64).index_add_(0, row_M.cpu(), nll_M.double().cpu())
        nll_N[indices] = nll_B
    return TargetLosses(tuple(nll_N.tolist()), tuple(len(row.target_ids) for row in rows))


@dataclass(frozen=True)
class EvaluationReport:
    """What an evaluation found."""

    metrics: Mapping[str, MetricValue]
    """By name; ``loss`` (nats per token) and ``perplexity`` among them where the targets were measured."""
    predictions: tuple[Prediction, ...]
    scores: Mapping[str, tuple[float, ...]]
    """Per metric the score of every record alone (a corpus score such as BLEU is not their mean)."""
    losses: TargetLosses | None
    decoding: DecodingConfig
    seed: int
    resamples: int
    """Of the bootstrap behind the metrics' standard errors."""
    seconds: Mapping[str, float]
    """Wall-clock time of ``generate`` and of ``loss``."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What was measured: model, prompt, task, split (plain data)."""

    def to_dict(self) -> dict[str, Any]:
        """Everything but the predictions, as plain data; a number that is not finite becomes ``None``."""
        finished = [one.finished for one in self.predictions]
        generated = sum(one.new_tokens or 0 for one in self.predictions)
        return {
            **self.facts,
            "metrics": {
                name: {"value": _finite(metric.value), "stderr": _finite(metric.stderr)}
                for name, metric in self.metrics.items()
            },
            "records": len(self.predictions),
            "finished": sum(bool(one) for one in finished),
            "target_tokens": sum(self.losses.tokens) if self.losses else None,
            "generated_tokens": generated,
            "decoding": to_dict(self.decoding),
            "seed": self.seed,
            "resamples": self.resamples,
            "seconds": dict(self.seconds),
        }

    def samples(self) -> list[dict[str, Any]]:
        """One mapping per record: input, prediction, references, scores."""
        return [self._sample(index, one) for index, one in enumerate(self.predictions)]

    def _sample(self, index: int, one: Prediction) -> dict[str, Any]:
        sample = {
            "id": one.example.id,
            "input": one.example.input,
            "prediction": one.text,
            "references": list(one.example.all_references),
            "scores": {name: _finite(values[index]) for name, values in self.scores.items()},
            "logprob": _finite(one.logprob),
            "finished": one.finished,
            "new_tokens": one.new_tokens,
        }
        if self.losses is not None:
            sample["target_nll"] = _finite(self.losses.nll[index])
            sample["target_tokens"] = self.losses.tokens[index]
        return sample


def evaluate(
    engine: Engine,
    inputs: Sequence[Encoded],
    targets: Sequence[Encoded] | None = None,
    *,
    metrics: Sequence[str],
    decoding: DecodingConfig,
    seed: int = 0,
    resamples: int = 1000,
    facts: Mapping[str, Any] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> EvaluationReport:
    """Generate, score, and measure the targets.

    Args:
        engine: The model with its prompts.
        inputs: The examples without their targets, each row with its own prompt.
        targets: The same examples with their targets, in the same order; ``None`` measures no loss.
        metrics: Names of metrics (:data:`~softprompts.evaluation.scorers.base.METRICS`).
        decoding: How outputs are generated.
        seed: For sampling and for the bootstrap.
        resamples: Of the bootstrap.
        facts: What is measured, kept in the report.
        on_progress: Called with the number of outputs that just became ready.

    Raises:
        ConfigError: A metric is unknown, or the decoding options make no sense.
        MissingExtraError: A metric needs something that is not installed.
        DataError: There are no records, or ``targets`` are other records than ``inputs``.
        LengthError: A row does not fit into the context.
    """
    chosen = [METRICS.get(name) for name in metrics]  # what cannot be scored is refused before minutes of work
    if lacking := unusable(metrics):
        raise MissingExtraError(
            "; ".join(f"metric '{name}' cannot be computed: {why}" for name, why in lacking.items())
        )
    if not inputs:
        raise DataError("there are no records to evaluate on; expected at least one")
    if targets is not None and [row.example.id for row in targets] != [row.example.id for row in inputs]:
        raise DataError("inputs and targets are not the same records in the same order; encode one list twice")
    engine.check(inputs, decoding)
    started = time.perf_counter()
    losses, states = None, engine.fold()
    if targets is not None:  # first, because it is quick and finds targets that do not fit
        losses = target_losses(engine.prompted, targets, batch_size=decoding.batch_size, states=states)
    measured = time.perf_counter()
    predictions = predict(engine, inputs, decoding, states=states, seed=seed, on_progress=on_progress)
    generated = time.perf_counter()
    texts = [one.text for one in predictions]
    references = [one.example.all_references for one in predictions]
    named = tuple(str(one.example.metadata.get("group", "")) for one in predictions)
    groups = named if all(named) else None  # MultiRC: the answers of one question
    values = score_all(metrics, texts, references, resamples=resamples, seed=seed, groups=groups)
    alone = {metric.name: metric.aggregate(metric.statistics(texts, references)) for metric in chosen}
    return EvaluationReport(
        metrics={**values, **({"loss": losses.loss, "perplexity": losses.perplexity} if losses else {})},
        predictions=tuple(predictions),
        scores={name: tuple(float(value) for value in scores) for name, scores in alone.items()},
        losses=losses,
        decoding=decoding,
        seed=seed,
        resamples=resamples,
        seconds={"generate": generated - measured, "loss": measured - started},
        facts=dict(facts or {}),
    )


def write_report(report: EvaluationReport, directory: str | Path) -> Path:
    """Write ``samples.jsonl`` and ``evaluation.json``; a file is there whole or as it was before.

    Raises:
        StorageError: The directory cannot be written.
    """
    directory = Path(directory)
    lines = "".join(json.dumps(one, ensure_ascii=False, allow_nan=False) + "\n" for one in report.samples())
    content = json.dumps(report.to_dict(), ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in ((_SAMPLES_FILE, lines), (_REPORT_FILE, content)):
            part = directory / f".{name}.part"
            part.write_text(text, encoding="utf-8")
            part.replace(directory / name)
    except OSError as error:
        raise StorageError(f"the report cannot be written to '{directory}': {error.strerror or error}") from error
    return directory


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
