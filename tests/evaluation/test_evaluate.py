"""Predictions, losses with standard errors and reports."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import tiny_model
from softprompts.config import DecodingConfig
from softprompts.errors import ConfigError, DataError, MissingExtraError, StorageError
from softprompts.evaluation.evaluate import TargetLosses, evaluate, target_losses, write_report
from softprompts.evaluation.metrics import score
from softprompts.evaluation.predict import predict
from softprompts.inference import Engine
from softprompts.prompted import PromptedLM
from softprompts.prompts import prompt_from_table
from softprompts.types import Encoded, Example

EOS = 256
EXAMPLES = [
    Example("name : Blue Spice", "Blue Spice is nice.", ("Blue Spice is nice.", "It is nice."), id="a"),
    Example("x", "y", id="b"),
    Example("a longer input than the others", "no", id="c"),
    Example("1 2 3", "four five six seven", id="d"),
    Example("zz", "top", id="e"),
]
DECODING = DecodingConfig(max_new_tokens=8, batch_size=2)


@pytest.fixture(scope="module")
def frozen(tiny_frozen):
    return tiny_frozen("gpt2")


@pytest.fixture(scope="module")
def engine(frozen):
    table_PD = frozen.embed(frozen.tokenize("answer: "))
    return Engine(PromptedLM(frozen, [prompt_from_table("embedding", frozen.geometry, table_PD)]))


def encoded(frozen, examples, prompt=-1, with_target=True):
    rows = []
    for example in examples:
        head = [*frozen.tokenize(example.input), EOS]
        tail = [*frozen.tokenize(example.target), EOS] if with_target else []
        rows.append(Encoded((*head, *tail), len(head), example, prompt))
    return rows


def test_records_of_a_group_are_judged_together(frozen, engine):
    """MultiRC: what the model says is right for q1's both answers and for one of q2's two."""
    rows = encoded(frozen, EXAMPLES[:4], with_target=False)
    said = [one.text for one in predict(engine, rows, DECODING)]
    right = [said[0], said[1], said[2], f"not {said[3]}"]
    judged = [
        replace(row, example=Example(row.example.input, text, id=row.example.id, metadata={"group": group}))
        for row, text, group in zip(rows, right, ["q1", "q1", "q2", "q2"], strict=True)
    ]
    metrics = ("accuracy", "group_exact_match")
    report = evaluate(engine, judged, metrics=metrics, decoding=DECODING)
    assert {name: report.metrics[name].value for name in metrics} == {"accuracy": 75.0, "group_exact_match": 50.0}


@pytest.mark.parametrize("prompt", [-1, 0])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_losses_are_those_of_the_plain_model(frozen, engine, prompt, batch_size):
    rows = encoded(frozen, EXAMPLES, prompt)
    losses = target_losses(engine.prompted, rows, batch_size=batch_size)
    plain = tiny_model("gpt2")
    before = frozen.tokenize("answer: ") if prompt == 0 else []
    for row, nll, tokens in zip(rows, losses.nll, losses.tokens, strict=True):
        ids = [*before, *row.ids]
        with torch.no_grad():
            logprobs_TV = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
        start = len(before) + row.target_start
        assert nll == pytest.approx(-sum(float(logprobs_TV[t - 1, ids[t]]) for t in range(start, len(ids))), rel=1e-4)
        assert tokens == len(row.example.target) + 1  # bytes and the end token


def test_loss_is_the_mean_over_tokens_and_its_error_that_of_records():
    values = [0.5, 1.5, 2.0, 4.0]
    single = TargetLosses(tuple(values), (1, 1, 1, 1))
    assert single.loss.value == pytest.approx(2.0)
    assert single.loss.stderr == pytest.approx(statistics.stdev(values) / 2)
    # Ten tokens that always agree tell no more than one.
    clustered = TargetLosses(tuple(10 * value for value in values), (10, 10, 10, 10))
    assert clustered.loss.value == pytest.approx(2.0)
    assert clustered.loss.stderr == pytest.approx(single.loss.stderr)
    assert single.perplexity.value == pytest.approx(math.exp(2.0))
    assert single.perplexity.stderr == pytest.approx(math.exp(2.0) * single.loss.stderr)
    assert TargetLosses((3.0,), (2,)).loss.stderr is None
    assert TargetLosses((3.0,), (2,)).perplexity.stderr is None


def test_loss_error_agrees_with_a_bootstrap_over_records():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 30, 400)
    nll = tokens * rng.gamma(4.0, 0.5, 400)
    losses = TargetLosses(tuple(nll.tolist()), tuple(tokens.tolist()))
    picks = rng.integers(0, 400, (4000, 400))
    bootstrap = (nll[picks].sum(axis=1) / tokens[picks].sum(axis=1)).std()
    assert losses.loss.stderr == pytest.approx(bootstrap, rel=0.06)


def test_predictions_are_the_engines_outputs(frozen, engine):
    rows = encoded(frozen, EXAMPLES, 0, with_target=False)
    generations = engine.generate(rows, DECODING)
    predictions = predict(engine, rows, DECODING)
    assert [one.example.id for one in predictions] == ["a", "b", "c", "d", "e"]
    assert [one.text for one in predictions] == [one.text.strip() for one in generations]
    assert [(one.new_tokens, one.finished) for one in predictions] == [(len(g.ids), g.finished) for g in generations]


def test_report_holds_metrics_losses_and_facts(frozen, engine, tmp_path):
    inputs, targets = encoded(frozen, EXAMPLES, 0, with_target=False), encoded(frozen, EXAMPLES, 0)
    ready = []
    report = evaluate(
        engine, inputs, targets, metrics=("rouge_score_l", "exact_match"), decoding=DECODING, resamples=50,
        facts={"task": "toy", "split": "test"}, on_progress=ready.append,
    )  # fmt: skip
    assert sum(ready) == 5
    texts, references = [one.text for one in report.predictions], [list(e.all_references) for e in EXAMPLES]
    assert report.metrics["rouge_score_l"] == score("rouge_score_l", texts, references, resamples=50)
    assert report.metrics["loss"].value == pytest.approx(target_losses(engine.prompted, targets).loss.value)
    assert statistics.mean(report.scores["rouge_score_l"]) == pytest.approx(report.metrics["rouge_score_l"].value)

    assert write_report(report, tmp_path / "out" / "run") == tmp_path / "out" / "run"
    content = json.loads((tmp_path / "out" / "run" / "evaluation.json").read_text())
    assert content == json.loads(json.dumps(report.to_dict()))
    assert (content["task"], content["records"], content["decoding"]["max_new_tokens"]) == ("toy", 5, 8)
    assert set(content["metrics"]) == {"rouge_score_l", "exact_match", "loss", "perplexity"}
    assert content["target_tokens"] == sum(len(e.target) + 1 for e in EXAMPLES)
    assert (content["seed"], content["resamples"]) == (0, 50)
    assert content["seconds"]["generate"] > 0
    samples = [json.loads(line) for line in (tmp_path / "out" / "run" / "samples.jsonl").read_text().splitlines()]
    assert [one["prediction"] for one in samples] == texts
    assert samples[0]["references"] == ["Blue Spice is nice.", "It is nice."]
    assert samples[0]["scores"].keys() == {"rouge_score_l", "exact_match"}
    assert samples[3]["target_tokens"] == len("four five six seven") + 1
    assert sorted(path.name for path in (tmp_path / "out" / "run").iterdir()) == ["evaluation.json", "samples.jsonl"]


def test_right_answers_score_a_hundred(frozen):
    """The references are what the model says, so the whole way from rows to scores must give 100."""
    engine = Engine(PromptedLM(frozen))
    said = predict(engine, encoded(frozen, EXAMPLES, with_target=False), DECODING)
    examples = [Example(one.example.input, one.text, id=one.example.id) for one in said]
    report = evaluate(
        engine, encoded(frozen, examples, with_target=False), metrics=("exact_match",), decoding=DECODING, resamples=20
    )
    assert report.metrics["exact_match"].value == 100.0
    assert report.metrics.keys() == {"exact_match"}
    assert report.to_dict()["target_tokens"] is None
    assert "target_nll" not in report.samples()[0]


def test_infinite_perplexity_is_written_as_null(frozen, engine):
    losses = TargetLosses((9000.0, 9001.0), (1, 1))
    assert losses.perplexity.value == math.inf
    report = evaluate(engine, encoded(frozen, EXAMPLES[:2], with_target=False), metrics=(), decoding=DECODING)
    report = replace(report, losses=losses, metrics={"perplexity": losses.perplexity})
    assert report.to_dict()["metrics"]["perplexity"] == {"value": None, "stderr": None}


def test_mistakes_are_refused(frozen, engine, tmp_path, monkeypatch):
    inputs, targets = encoded(frozen, EXAMPLES, with_target=False), encoded(frozen, EXAMPLES)
    with monkeypatch.context() as patched:
        patched.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(MissingExtraError, match="'meteor' cannot be computed"):
            evaluate(engine, inputs, metrics=("meteor",), decoding=DECODING)
    with pytest.raises(ConfigError, match="rouge_score_l"):
        evaluate(engine, inputs, metrics=("rouge",), decoding=DECODING)
    with pytest.raises(DataError, match="same records in the same order"):
        evaluate(engine, inputs, targets[::-1], metrics=(), decoding=DECODING)
    with pytest.raises(DataError, match="no records"):
        evaluate(engine, [], metrics=(), decoding=DECODING)
    with pytest.raises(DataError, match="no records"):
        target_losses(engine.prompted, [])
    with pytest.raises(DataError, match="record 'a' has no target"):
        target_losses(engine.prompted, inputs)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be written"):
        write_report(evaluate(engine, inputs[:1], metrics=(), decoding=DECODING), tmp_path / "file")
