"""Metrics against sacreBLEU, rouge_score and the official scores of published systems."""

import csv
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from softprompts.errors import ConfigError, DataError
from softprompts.evaluation.metrics import METRICS, score, score_all
from softprompts.tasks import data_root

WORDS = ["The", "the", "cat", "sat", "on", "a", "mat,", "dog's", "£30", "5-star.", "Café", "?", "|", "naïve"]
TEXT = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
CORPUS = st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=4)), min_size=1, max_size=6)


def official_bleu(predictions: list[str], references: list[list[str]], lowercase: bool) -> float:
    most = max(map(len, references))
    streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    return BLEU(lowercase=lowercase).corpus_score(predictions, streams).score


@given(CORPUS, st.booleans())
@settings(max_examples=300)
def test_bleu_is_sacrebleu(corpus: list[tuple[str, list[str]]], lowercase: bool):
    predictions, references = [p for p, _ in corpus], [r for _, r in corpus]
    ours = score("e2e_bleu" if lowercase else "bleu", predictions, references, resamples=0).value
    assert ours == pytest.approx(official_bleu(predictions, references, lowercase), abs=1e-9)


def test_bleu_standard_error_is_that_of_rescored_strings():
    """The fast bootstrap (sums of statistics) against the plain one: the same resamples, scored from the strings."""
    generator = np.random.default_rng(1)
    references = [[" ".join(generator.choice(WORDS, 12)) for _ in range(2)] for _ in range(40)]
    predictions = [" ".join(word for word in texts[0].split() if generator.random() > 0.2) for texts in references]
    drawn = np.random.default_rng(7)
    plain = []
    for _ in range(60):
        rows = drawn.integers(0, 40, 40)
        plain.append(official_bleu([predictions[i] for i in rows], [references[i] for i in rows], False))
    fast = score("bleu", predictions, references, resamples=60, seed=7)
    assert fast.stderr == pytest.approx(np.std(plain, ddof=1), rel=1e-9)


@given(CORPUS)
@settings(max_examples=50)
def test_rouge_l_is_the_package_s_with_the_best_reference(corpus: list[tuple[str, list[str]]]):
    scorer = RougeScorer(["rougeL"])
    best = [max(scorer.score(text, p)["rougeL"].fmeasure for text in texts) for p, texts in corpus]
    ours = score("rouge_l", [p for p, _ in corpus], [r for _, r in corpus], resamples=0).value
    assert ours == pytest.approx(100 * np.mean(best))


def test_exact_match_and_accuracy():
    predictions, references = ["yes ", "a  b", "No", "x"], [["no", "yes"], ["a b"], ["no"], ["y"]]
    for name in ("exact_match", "accuracy"):
        assert score(name, predictions, references, resamples=0).value == 50.0


def test_standard_error_of_a_mean_is_the_textbook_one():
    predictions = ["a"] * 300 + ["b"] * 100
    value = score("accuracy", predictions, [["a"]] * 400)
    assert value.value == 75.0
    assert value.name == "accuracy"
    assert value.stderr == pytest.approx(100 * (0.75 * 0.25 / 400) ** 0.5, rel=0.1)


def test_standard_error_depends_on_the_seed_alone():
    data = (["a", "b", "a", "c", "d"], [["a"], ["b"], ["c"], ["c"], ["x"]])
    assert score("accuracy", *data, seed=3) == score("accuracy", *data, seed=3)
    assert score("accuracy", *data, seed=3).stderr != score("accuracy", *data, seed=4).stderr
    assert score("accuracy", *data, resamples=0).stderr is None
    assert score("accuracy", ["a"], [["a"]]).stderr is None  # one record says nothing about spread
    assert score("accuracy", ["a", "a"], [["a"], ["a"]]).stderr == 0.0


def test_splitting_the_resamples_to_save_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    data = (["a", "b", "a", "c", "d"], [["a"], ["b"], ["c"], ["c"], ["x"]])
    whole = score("bleu", *data, resamples=50)
    monkeypatch.setattr("softprompts.evaluation.metrics._CHUNK_BYTES", 3 * 8 * 5)
    assert score("bleu", *data, resamples=50) == whole


def test_a_perfect_and_an_empty_corpus():
    texts = ["the cat sat on the mat", "a dog was here today"]
    references = [[text] for text in texts]
    perfect = {name: value.value for name, value in score_all(METRICS.names(), texts, references, resamples=0).items()}
    assert perfect == pytest.approx(dict.fromkeys(METRICS.names(), 100.0))
    empty = {name: value.value for name, value in score_all(METRICS.names(), ["", ""], references).items()}
    assert empty == dict.fromkeys(METRICS.names(), 0.0)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a"], [["a"], ["b"]], "got 1 predictions for 2 records"),
        ([], [], "at least one record"),
        (["a", "b"], [["a"], []], "references of record 1"),
        (["a"], ["a"], "references of record 0 are 'a', expected a list"),
    ],
)
def test_wrong_data_is_refused(predictions: list, references: list, message: str):
    with pytest.raises(DataError, match=message):
        score("bleu", predictions, references)


def test_wrong_names_and_numbers_are_refused():
    with pytest.raises(ConfigError, match="unknown metric 'blue': did you mean 'bleu'"):
        score("blue", ["a"], [["a"]])
    for resamples in (-1, 1):
        with pytest.raises(ConfigError, match="resamples"):
            score("bleu", ["a"], [["a"]], resamples=resamples)


def folder(name: str) -> Path:
    root = data_root()
    path = (root or Path()) / "metric_refs" / name
    if root is None or not path.is_dir():
        pytest.skip(f"metric_refs/{name} is not there: set SOFTPROMPTS_DATA")
    return path


@pytest.mark.data
@pytest.mark.parametrize("system", ["tgen", "slug", "zhang", "chen", "zhaw1"])
def test_e2e_bleu_is_the_official_scorer_s(system: str):
    path = folder("e2e")
    with (path / "scores.tsv").open(encoding="utf-8") as lines:
        official = {row["system"]: float(row["BLEU"]) for row in csv.DictReader(lines, delimiter="\t")}
    lines = (path / "test_references.jsonl").read_text(encoding="utf-8").splitlines()
    references = [json.loads(line)["references"] for line in lines]
    predictions = (path / "outputs" / f"{system}.txt").read_text(encoding="utf-8").splitlines()
    assert len(predictions) == len(references) == 630
    start = time.perf_counter()
    value = score("e2e_bleu", predictions, references)
    assert time.perf_counter() - start < 20
    assert value.value == pytest.approx(100 * official[system], abs=0.006)
    assert 0.3 < value.stderr < 1.5


@pytest.mark.data
def test_rouge_l_on_a_published_summarizer():
    path = folder("xsum")
    expected = json.loads((path / "expected_rouge_score.json").read_text(encoding="utf-8"))["scores"]
    predictions = (path / "ptgen-test-output.txt").read_text(encoding="utf-8").splitlines()
    references = [[line] for line in (path / "gold-test-sentences.txt").read_text(encoding="utf-8").splitlines()]
    value = score("rouge_l", predictions, references, resamples=100)
    assert value.value == pytest.approx(expected["ptgen/stem=False"]["rougeL"][2], abs=1e-3)
