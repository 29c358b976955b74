"""Each family of metrics against the library or the script that it follows."""

from __future__ import annotations

import math
import sys
import types
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER

from softprompts.errors import DataError, MissingExtraError
from softprompts.evaluation.metrics import rows_of, score, unusable
from softprompts.evaluation.scorers import METRICS, java
from softprompts.evaluation.scorers.bleu import webnlg_tokens
from softprompts.evaluation.scorers.meteor import meteor_process
from softprompts.evaluation.scorers.questions import normal_answer

WORDS = ["The", "the", "cat", "sat", "on", "a", "mat,", "dog's", "£30", "5-star.", "Café", "?"]
TEXT = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
FULL = st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join)
CORPUS = st.lists(st.tuples(TEXT, st.lists(FULL, min_size=1, max_size=3)), min_size=1, max_size=6)
Corpus = list[tuple[str, list[str]]]
needs_java = pytest.mark.skipif(bool(java.missing_java()), reason=java.missing_java() or "Java is there")


def value(metric: str, predictions: list[str], references: list[list[str]]) -> float:
    return score(metric, predictions, references, resamples=0).value


def streams(references: list[list[str]]) -> list[list[str | None]]:
    return [[texts[i] if i < len(texts) else None for texts in references] for i in range(max(map(len, references)))]


@given(CORPUS)
@settings(max_examples=100)
def test_chrf_and_ter_are_sacrebleu_s(corpus: Corpus):
    predictions, references = [p for p, _ in corpus], [r for _, r in corpus]
    for name, official in (("chrf", CHRF()), ("ter", TER())):
        expected = official.corpus_score(predictions, streams(references)).score
        assert value(name, predictions, references) == pytest.approx(expected, abs=1e-9), name


@given(CORPUS)
@settings(max_examples=100)
def test_multi_bleu_is_unsmoothed_bleu_of_tokens(corpus: Corpus):
    predictions, references = [p for p, _ in corpus], [r[:1] for _, r in corpus]
    plain = BLEU(tokenize="none", smooth_method="none", force=True)
    expected = plain.corpus_score(predictions, streams(references)).score
    assert value("multi_bleu", predictions, references) == pytest.approx(expected, abs=1e-9)


def test_multi_bleu_takes_a_missing_reference_for_one_of_length_zero():
    """As the script does, which reads an empty line: 5 words are nearer to none than to 12, so nothing is too short."""
    predictions, long = ["a b c d e", "a b c d e"], "a b c d e f g h i j k l"
    both = value("multi_bleu", predictions, [[long, long], [long, long]])
    assert both == pytest.approx(100 * math.exp(1 - 24 / 10))
    assert value("multi_bleu", predictions, [[long, long], [long]]) == pytest.approx(100 * math.exp(1 - 12 / 10))


def test_webnlg_tokens():
    assert webnlg_tokens("Adolfo_Suárez–Madrid (LEMD), 3.5 km") == "adolfo_suárez – madrid ( lemd ) , 3 . 5 km"


def plain_nist(predictions: list[list[str]], references: list[list[list[str]]]) -> float:
    """NIST as Doddington writes it down, over tokens."""

    def grams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    everything = [words for texts in references for words in texts]
    total, length = 0.0, sum(map(len, predictions))
    for n in range(1, 6):
        gain, number = 0.0, 0
        for output, texts in zip(predictions, references, strict=True):
            number += max(len(output) - n + 1, 0)
            for gram, count in grams(output, n).items():
                hits = min(count, max(grams(words, n)[gram] for words in texts))
                if hits:
                    seen = sum(grams(words, n)[gram] for words in everything)
                    before = sum(grams(words, n - 1)[gram[:-1]] if n > 1 else len(words) for words in everything)
                    gain += hits * math.log2(before / seen)
        total += gain / number if number else 0.0
    ratio = min(length / (sum(map(len, everything)) / len(everything) * len(references)), 1.0)
    return total * math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(ratio) ** 2) if length else 0.0


@given(CORPUS)
@settings(max_examples=60)
def test_nist(corpus: Corpus):
    simple = str.maketrans("", "", ",.'?£-")
    predictions = [p.translate(simple) for p, _ in corpus]
    references = [[f"x {text.translate(simple)}" for text in texts] for _, texts in corpus]
    expected = plain_nist(
        [p.lower().split() for p in predictions], [[t.lower().split() for t in r] for r in references]
    )
    assert value("nist", predictions, references) == pytest.approx(expected, abs=1e-6)


def test_rouge_score_with_and_without_stemming():
    predictions, references = ["the cats were running"], [["the cat runs"]]
    assert value("rouge_score_1", predictions, references) == pytest.approx(100 * 2 / 7)
    assert value("rouge_score_1_stem", predictions, references) == pytest.approx(100 * 6 / 7)
    assert value("rouge_score_2", predictions, references) == 0.0


# --------------------------------------------------------------------------------------------------------------------
# Labels and answers
# --------------------------------------------------------------------------------------------------------------------


def test_f1_of_the_positive_class():
    references = [["True"], ["True"], ["False"], ["False"]]
    assert value("f1", ["True", "False", "True", "False"], references) == pytest.approx(50.0)
    # no label at all is the wrong label: 1 of 2 found, 3 said
    assert value("f1", ["True", "False", "True", "nonsense"], references) == pytest.approx(100 * 2 / (3 + 2))
    assert value("f1", ["True", "", "False", "False"], references) == pytest.approx(100 * 2 / (1 + 2))
    assert value("f1", ["False"] * 4, references) == 0.0
    with pytest.raises(DataError, match="label 'cat' is the positive class"):
        value("f1", ["cat"], [["cat"]])


def test_macro_f1_by_hand():
    references = [["e"], ["e"], ["c"], ["n"]]
    # e: precision 1, recall 1/2; c: 1/2 and 1; n: nothing right.
    assert value("macro_f1", ["e", "c", "c", "?"], references) == pytest.approx(100 * (2 / 3 + 2 / 3 + 0) / 3)
    with pytest.raises(DataError, match="exactly one right answer"):
        value("macro_f1", ["e"], [["e", "c"]])


def test_matthews_is_the_textbook_formula_for_two_classes():
    generator = np.random.default_rng(2)
    real, said = generator.integers(0, 2, 50), generator.integers(0, 2, 50)
    expected = np.corrcoef(real, said)[0, 1]
    assert value("matthews", [str(x) for x in said], [[str(x)] for x in real]) == pytest.approx(100 * expected)
    assert value("matthews", ["1"] * 50, [[str(x)] for x in real]) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("The Eiffel Tower!", "eiffel tower"), ("a  an the", ""), ("AN-other", "another"), ("50%", "50"), ("", "")],
)
def test_normal_answer(text: str, expected: str):
    assert normal_answer(text) == expected


def test_squad_scores_take_the_best_reference():
    predictions, references = ["the big tower", "no"], [["tower", "big red tower"], ["yes"]]
    assert value("squad_em", ["The tower.", "no"], references) == 50.0
    assert value("squad_f1", predictions, references) == pytest.approx(100 * 0.8 / 2)


# --------------------------------------------------------------------------------------------------------------------
# Java
# --------------------------------------------------------------------------------------------------------------------

SPOKEN = ["Blue Spice is a pub.", "There's a (cheap) coffee shop; it isn't far… it's £20-25.", "", "the pub"]
HEARD = [
    ["Blue Spice is a pub near the river.", "A pub: Blue Spice."],
    ["There is a cheap coffee shop.", "A coffee shop that isn't far."],
    ["Nothing at all."],
    ["the pub"],
]


@needs_java
def test_meteor_is_what_the_program_says():
    """Our sum of its statistics against its own ("EVAL"), in the form of pycocoevalcap."""
    rows = rows_of("meteor_plain", SPOKEN, HEARD)
    lines = [" ||| ".join(["SCORE", *texts, said]) for said, texts in zip(SPOKEN, HEARD, strict=True)]
    statistics = meteor_process().ask(lines)
    *alone, together = meteor_process().ask([" ||| ".join(["EVAL", *statistics])], answers=len(SPOKEN) + 1)
    aggregate = METRICS.get("meteor_plain").aggregate
    assert aggregate(rows).tolist() == pytest.approx([100 * float(one) for one in alone], abs=1e-9)
    assert aggregate(rows.sum(axis=0, keepdims=True))[0] == pytest.approx(100 * float(together), abs=1e-9)


@needs_java
def test_caption_metrics_are_pycocoevalcap_s():
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    said = tokenizer.tokenize({i: [{"caption": text}] for i, text in enumerate(SPOKEN)})
    heard = tokenizer.tokenize({i: [{"caption": text} for text in texts] for i, texts in enumerate(HEARD)})
    assert value("rouge_l", SPOKEN, HEARD) == pytest.approx(100 * Rouge().compute_score(heard, said)[0])
    assert value("cider", SPOKEN, HEARD) == pytest.approx(Cider().compute_score(heard, said)[0])


@needs_java
def test_line_breaks_inside_a_text_do_not_shift_the_others():
    broken = ["Blue Spice\u2028is a\x85pub.\r\n", *SPOKEN[1:]]
    for name in ("rouge_l", "meteor", "meteor_plain"):
        assert rows_of(name, broken, HEARD).tolist() == rows_of(name, SPOKEN, HEARD).tolist(), name
    odd = [["a ||| b", "|||"], ["x"]]
    assert rows_of("meteor_plain", ["a b", "|||"], odd).shape == (2, 23)


def test_without_java_the_reason_is_given(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(java, "missing_package", lambda name: "")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert set(unusable(["bleu", "meteor", "rouge_l", "cider"])) == {"meteor", "rouge_l", "cider"}
    with pytest.raises(MissingExtraError, match="'meteor' cannot be computed: Java is not installed"):
        score("meteor", ["a"], [["a"]])


def test_without_the_package_the_reason_is_given(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        MissingExtraError, match=r"pycocoevalcap is not installed \(pip install 'softprompts\[metrics\]'"
    ):
        score("cider", ["a"], [["a"]])


# --------------------------------------------------------------------------------------------------------------------
# Metrics with a model of their own
# --------------------------------------------------------------------------------------------------------------------


def module(name: str, **content: object) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(content)
    made.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
    return made


def test_bert_score_takes_every_reference_and_its_f1(monkeypatch: pytest.MonkeyPatch):
    class Scorer:
        def __init__(self, lang: str) -> None:
            assert lang == "en"

        def score(self, said: list[str], heard: list[list[str]]) -> tuple[list[float], ...]:
            return [0.0] * 2, [0.0] * 2, [float(said[0] in heard[0]), 0.5]

    monkeypatch.setitem(sys.modules, "bert_score", module("bert_score", BERTScorer=Scorer))
    assert value("bert_score", ["a", "b"], [["x", "a"], ["y"]]) == 75.0


def test_a_model_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch):
    def offline(lang: str) -> None:
        raise OSError("no connection")

    monkeypatch.setitem(sys.modules, "bert_score", module("bert_score", BERTScorer=offline))
    with pytest.raises(MissingExtraError, match=r"roberta-large, from the Hugging Face hub\): no connection"):
        score("bert_score", ["a"], [["a"]])
    monkeypatch.delenv("BLEURT_CHECKPOINT", raising=False)
    monkeypatch.setitem(sys.modules, "bleurt", module("bleurt"))
    with pytest.raises(MissingExtraError, match="BLEURT_CHECKPOINT does not name a folder"):
        score("bleurt", ["a"], [["a"]])


@pytest.mark.parametrize(("metric", "package"), [("mover_score", "moverscore_v2"), ("bleurt", "bleurt")])
def test_a_package_that_is_not_there_is_named(metric: str, package: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=f"the package {package} is not installed"):
        score(metric, ["a"], [["a"]])
