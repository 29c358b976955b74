"""Classification judged in both ways: what is written, which choice is likeliest, and what the majority would get."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from conftest import tiny_model
from softprompts.config import DecodingConfig
from softprompts.errors import DataError
from softprompts.evaluation.classification import illegal_answers, is_legal, majority_of
from softprompts.evaluation.evaluate import evaluate, write_report
from softprompts.evaluation.metrics import score
from softprompts.evaluation.predict import Ranking, predict, rank
from softprompts.inference import Engine, score_choices
from softprompts.prompted import PromptedLM
from softprompts.prompts import prompt_from_table
from softprompts.types import Encoded, Example, Prediction

EOS = 256
WORDS = ("False", "True")
TARGETS = ["True", "False", "True", "True", "False", "True"]
EXAMPLES = [
    Example(f"question {number * 'x'}", target, choices=WORDS, id=str(number)) for number, target in enumerate(TARGETS)
]
DECODING = DecodingConfig(max_new_tokens=6, batch_size=4)


@pytest.fixture(scope="module")
def engine(tiny_frozen):
    frozen = tiny_frozen("gpt2")
    table_PD = frozen.embed(frozen.tokenize("answer: "))
    return Engine(PromptedLM(frozen, [prompt_from_table("embedding", frozen.geometry, table_PD)]))


def encoded(examples, prompt=0, with_target=False):
    rows = []
    for example in examples:
        head = [*example.input.encode(), 10]
        tail = [*example.target.encode(), EOS] if with_target else []
        rows.append(Encoded((*head, *tail), len(head), example, prompt))
    return rows


def tokens_of(words):
    return [(*word.encode(), EOS) for word in words]


CHOICES = [tokens_of(WORDS)] * len(EXAMPLES)


def test_the_likeliest_choice_is_predicted(engine):
    rows = encoded(EXAMPLES)
    sums = score_choices(engine, rows, CHOICES)
    for one, scores in zip(rank(engine, rows, Ranking(CHOICES)), sums, strict=True):
        assert one.choice_scores == scores
        assert one.text == one.ranked == WORDS[scores.index(max(scores))]
        assert one.finished is None


def test_scores_per_token_and_over_an_empty_input(engine):
    rows = encoded(EXAMPLES)
    sums = score_choices(engine, rows, CHOICES)
    mean = rank(engine, rows, Ranking(CHOICES, "mean"))
    assert [one.choice_scores for one in mean] == [pytest.approx((a / 6, b / 5)) for a, b in sums]
    rows[0] = replace(rows[0], prompt=-1)  # has another prior: no prompt in front of the empty input either
    empty = [Encoded((10,), 1, row.example, row.prompt) for row in rows]
    gains = rank(engine, rows, Ranking(CHOICES, "prior", empty))
    priors, sums = score_choices(engine, empty, CHOICES), score_choices(engine, rows, CHOICES)
    assert priors[0] != pytest.approx(priors[1])
    for one, own, prior in zip(gains, sums, priors, strict=True):
        assert one.choice_scores == pytest.approx([a - b for a, b in zip(own, prior, strict=True)], abs=1e-4)


def test_both_ways_stand_in_one_report(engine, tmp_path):
    rows, targets = encoded(EXAMPLES), encoded(EXAMPLES, with_target=True)
    ready: list[int] = []
    majority = majority_of(EXAMPLES, "train")
    report = evaluate(
        engine, rows, targets, metrics=("accuracy", "f1"), decoding=DECODING, ranking=Ranking(CHOICES),
        majority=majority, resamples=50, on_progress=ready.append,
    )  # fmt: skip
    assert sum(ready) == 2 * len(rows)
    said, ranked = predict(engine, rows, DECODING), rank(engine, rows, Ranking(CHOICES))
    references = [[target] for target in TARGETS]
    for name in ("accuracy", "f1"):
        for prefix, texts in (
            ("", [one.text for one in said]),
            ("ranked/", [one.text for one in ranked]),
            ("majority/", ["True"] * len(rows)),
        ):
            assert report.metrics[prefix + name] == score(name, texts, references, resamples=50)
    assert report.metrics["majority/accuracy"].value == pytest.approx(100 * 4 / 6)
    assert report.metrics["illegal"].value == 100.0  # a random model says no word at all
    assert {"loss", "perplexity"} < set(report.metrics)
    assert [(one.text, one.ranked) for one in report.predictions] == [
        (one.text, other.text) for one, other in zip(said, ranked, strict=True)
    ]
    write_report(report, tmp_path)
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert (content["generated"], content["ranked_by"]) == (True, "sum")
    assert content["illegal"]["count"] == len(rows)
    assert sum(content["illegal"]["commonest"].values()) <= len(rows)
    assert content["majority"] == {"label": "True", "counted_on": "train", "share": pytest.approx(4 / 6)}
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert samples[0]["choices"] == pytest.approx(dict(zip(WORDS, ranked[0].choice_scores, strict=True)))
    assert samples[0]["ranked"] == ranked[0].text
    assert samples[0]["scores"].keys() == {"accuracy", "f1", "ranked/accuracy", "ranked/f1"}


def test_ranking_alone_generates_nothing(engine):
    rows = encoded(EXAMPLES)
    report = evaluate(
        engine, rows, metrics=("accuracy",), decoding=DECODING, generating=False, ranking=Ranking(CHOICES), resamples=20
    )
    assert set(report.metrics) == {"ranked/accuracy"}
    assert (report.generated, report.illegal) == (False, None)
    assert {one.text for one in report.predictions} <= set(WORDS)
    assert report.to_dict()["finished"] is None
    assert "illegal" not in evaluate(engine, rows[:2], metrics=(), decoding=DECODING, generating=False,
                                     ranking=Ranking(CHOICES[:2])).metrics  # fmt: skip


def test_what_the_model_says_is_told_from_what_it_must_not_say():
    """Blanks make no difference, case does."""
    assert is_legal(" not  equivalent", ("not equivalent",))
    assert not is_legal("true", WORDS)
    said = ["True", "maybe", "True ", "maybe", "", "False"]
    predictions = [Prediction(example, text) for example, text in zip(EXAMPLES, said, strict=True)]
    found = illegal_answers(predictions)
    assert found is not None
    assert (found.count, found.records, found.commonest) == (3, 6, (("maybe", 2), ("", 1)))
    assert found.share.value == 50.0
    assert found.share.stderr == pytest.approx(100 * (0.25 / 5) ** 0.5)
    assert illegal_answers([*predictions, Prediction(Example("x", "free text"), "y")]) is None


def test_the_first_of_equally_common_labels_is_the_majority():
    assert majority_of(EXAMPLES, "dev").label == "True"
    assert majority_of(EXAMPLES[:2], "dev").label == "False"
    with pytest.raises(DataError, match="examples with choices"):
        majority_of([Example("x", "free text")], "dev")


def test_mistakes_are_refused(engine):
    rows = encoded(EXAMPLES)
    with pytest.raises(DataError, match="neither generating nor ranking"):
        evaluate(engine, rows, metrics=(), decoding=DECODING, generating=False)
    with pytest.raises(DataError, match="record '0' has 2 choices, but tokens are given for 3"):
        rank(engine, rows, Ranking([tokens_of(("a", "b", "c"))] * len(rows)))
    with pytest.raises(DataError, match="0 rows of empty input for 6 rows"):
        rank(engine, rows, Ranking(CHOICES, "prior"))
    secret = [replace(row, example=replace(row.example, target="<unk>")) for row in rows]
    with pytest.raises(DataError, match="record '0' has no label"):
        evaluate(engine, secret, metrics=("accuracy",), decoding=DECODING)
    report = evaluate(engine, secret, metrics=(), decoding=DECODING, ranking=Ranking(CHOICES))
    assert set(report.metrics) == {"illegal"}
    assert all(one.ranked in WORDS for one in report.predictions)


def test_a_trained_model_is_what_is_asked(engine):
    """Not the frozen one: another model ranks otherwise (the engine is not bypassed)."""
    other = Engine(PromptedLM(type(engine.frozen).from_model(tiny_model("gpt2", seed=5), engine.frozen.tokenizer)))
    rows = encoded(EXAMPLES, prompt=-1)
    assert score_choices(other, rows, CHOICES)[0] != pytest.approx(score_choices(engine, rows, CHOICES)[0], abs=1e-3)
