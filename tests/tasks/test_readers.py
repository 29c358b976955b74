"""What single readers of the catalog have to get right: hub places, spans, acts, punctuation, label words."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softprompts.config import TaskConfig
from softprompts.errors import ConfigError, DataError
from softprompts.tasks import get_task, template_format
from softprompts.tasks.catalog import load_catalog
from softprompts.tasks.catalog.rnnlg import linearize_act
from softprompts.tasks.catalog.squad import pad_punctuation
from softprompts.tasks.catalog.wsc import mark_pronoun
from softprompts.tasks.formats import template_words
from softprompts.tasks.labels import Verbalizer
from softprompts.tasks.sources import hub_splits, read_records

FIXTURES = Path(__file__).parent / "fixtures"


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_the_hub_is_asked_for_its_parquet_copy_and_names_labels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The copy has no scripts; its label columns say the names of their ids, which ``datasets`` knows."""
    features = datasets.Features(
        {
            "premise": datasets.Value("string"),
            "hypothesis": datasets.Value("string"),
            "idx": datasets.Value("int32"),
            "label": datasets.ClassLabel(names=["entailment", "contradiction", "neutral"]),
        }
    )
    rows = [{"premise": "p", "hypothesis": "h", "idx": 0, "label": 1}, {"premise": "p", "hypothesis": "h", "label": -1}]
    asked = []

    def load_dataset(*arguments: object, **options: object) -> datasets.DatasetDict:
        asked.append((arguments, options))
        return datasets.DatasetDict({"validation": datasets.Dataset.from_list(rows[: len(asked)], features=features)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setenv("SOFTPROMPTS_DATA", str(tmp_path))
    (example,) = get_task("superglue_cb").load("dev")
    assert (example.input, example.target) == ("hypothesis: h premise: p", "contradiction")
    assert asked == [(("aps/super_glue", None), {"revision": "refs/convert/parquet", "data_dir": "cb"})]
    with pytest.raises(DataError, match=r"'aps/super_glue', row 1: field 'label' is -1, .*keeps the labels .* secret"):
        get_task("superglue_cb").load("dev")


def test_a_parquet_copy_on_disk_is_read_by_folder(tmp_path: Path):
    rows = datasets.Dataset.from_list([{"text": "x", "label": 1}])
    rows = rows.cast_column("label", datasets.ClassLabel(names=["no", "yes"]))
    rows.to_parquet(tmp_path / "validation" / "0000.parquet")
    assert read_records(tmp_path, "dev") == [{"text": "x", "label": "yes"}]


def test_the_places_of_hub_splits():
    assert hub_splits("a/b", "c", dev="validation") == {
        "dev": "datasets:a/b?data_dir=c&revision=refs/convert/parquet&split=validation"
    }
    assert hub_splits("a/b", test="test") == {"test": "datasets:a/b?revision=refs/convert/parquet&split=test"}


@pytest.mark.parametrize("name", [name for name in load_catalog() if name not in ("records", "gazette")])
def test_every_task_but_rnnlg_is_on_the_hub(name: str):
    source = get_task(name).source
    assert bool(source.hub) is not name.startswith("rnnlg_")
    assert set(source.hub) >= set(source.local) or name in ("mrqa_race", "rnnlg_hotel", "rnnlg_restaurant")


# --- WSC, MultiRC, ReCoRD --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pronoun", "index", "marked"),
    [
        ("The cup broke because it was thin .", "it", 4, "The cup broke because *it* was thin ."),
        ('They saw him run. "Help him," she said. ', "him", 5, 'They saw him run. "Help *him* ," she said.'),
        ("They may want to use it , but not it now", "it", 4, "They may want to use *it* , but not it now"),
        ("Ann thanked Bea. She smiled", "She", 3, "Ann thanked Bea. *She* smiled"),
        (
            "The cup fell when it  tipped . ",
            "it",
            4,
            "The cup fell when *it*  tipped . ",
        ),  # T5 leaves blanks as they are
        ("It is its lid", "it", 9, None),
    ],
)
def test_the_pronoun_is_marked_where_it_stands(text: str, pronoun: str, index: int, marked: str | None):
    if marked is not None:
        assert mark_pronoun(text, pronoun, index) == marked
        return
    with pytest.raises(DataError, match=r"pronoun 'it' .* is not in the text"):
        mark_pronoun(text, pronoun, index)


def load(name: str, split: str, kind: str) -> list:
    path = str(FIXTURES / f"{name}.{kind}.jsonl")
    return get_task(name).load(split, TaskConfig(name=name, train=path, dev=path))


@pytest.mark.parametrize("kind", ["local", "hub"])
def test_wsc_trains_on_true_items_and_judges_all(kind: str):
    assert [example.target for example in load("superglue_wsc", "train", kind)] == ["The jug", "Tom"]
    assert [example.references for example in load("superglue_wsc", "dev", kind)] == [
        ("True", "The jug"),
        ("False", "The shelf"),
        ("True", "Tom"),
    ]


def test_the_two_sentences_that_t5_spells_out():
    """As in T5's preprocessor, byte for byte."""
    whip = (
        "The boy continued to whip the pony , and eventually the pony threw him over. John laughed out quite loud. "
        '"Good for him," he said. '
    )
    assert mark_pronoun(whip, "him", whip.split().index('him,"')) == whip.replace('him,"', '*him* ,"').rstrip()
    pebble = (
        "When they had eventually calmed down a bit , and had gotten home, Mr. Farley put the magic pebble in an iron "
        "safe . Some day they might want to use it , but really for now, what more could they wish for?"
    )
    assert mark_pronoun(pebble, "it", pebble.split().index("use")) == pebble.replace("use it ,", "use *it* ,")


SECRET = {
    "glue_sst2": {"sentence": "fine", "label": -1},
    "glue_mrpc": {"sentence1": "a", "sentence2": "b", "label": -1},
    "superglue_boolq": {"passage": "a", "question": "b", "idx": 0},
    "superglue_multirc": {
        "idx": 0,
        "passage": {"text": "a", "questions": [{"question": "b", "idx": 0, "answers": [{"text": "c", "idx": 0}]}]},
    },
    "superglue_record": {
        "idx": 0,
        "passage": {"text": "Bea ran", "entities": [{"start": 0, "end": 2}]},
        "qas": [{"idx": 0, "query": "@placeholder ran"}],
    },
    "superglue_wsc": {"text": "Bea ran , she won", "span1_text": "Bea", "span2_text": "she", "span2_index": 3},
}


@pytest.mark.parametrize("name", SECRET)
def test_a_test_record_without_its_label_has_the_target_unk(name: str, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(SECRET[name]))
    task = get_task(TaskConfig(name=name, dev=str(path), test=str(path)))
    (example,) = task.load("test")
    assert "<unk>" in (example.target, *example.references)
    with pytest.raises(DataError, match=r"rows\.jsonl', line 1: "):
        task.load("dev")


@pytest.mark.parametrize("kind", ["local", "hub"])
def test_multirc_answers_of_a_question_are_one_group(kind: str):
    examples = load("superglue_multirc", "dev", kind)
    assert [(example.id, example.metadata["group"]) for example in examples] == [
        ("0-0-0", "0-0"),
        ("0-0-1", "0-0"),
        ("0-1-2", "0-1"),
    ]
    assert not any(mark in example.input for example in examples for mark in ("<b>", "</b>", "<br>"))


@pytest.mark.parametrize("kind", ["local", "hub"])
def test_record_trains_on_every_right_entity_and_judges_each_query_once(kind: str):
    train, dev = load("superglue_record", "train", kind), load("superglue_record", "dev", kind)
    assert [(example.id, example.target) for example in train] == [
        ("0-0", "Port Elder"),
        ("0-1-0", "Brae"),
        ("0-1-1", "Port Elder"),
    ]
    assert [(example.id, example.references) for example in dev] == [
        ("0-0", ("Port Elder",)),
        ("0-1", ("Brae", "Port Elder")),
    ]
    assert "Lena Moor. Lena Moor runs the harbour. Boats" in dev[0].input  # the highlights: one after no full stop
    assert "@highlight" not in dev[0].input


def test_record_refuses_an_answer_that_is_no_entity(tmp_path: Path):
    row = {
        "passage": "x",
        "query": "@placeholder",
        "entities": ["a"],
        "answers": ["b"],
        "idx": {"passage": 0, "query": 0},
    }
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"rows\.jsonl', line 1: the answer 'b' is none of the entities \['a'\]"):
        get_task("superglue_record").load("dev", TaskConfig(name="superglue_record", dev=str(path)))


# --- triples, acts, punctuation --------------------------------------------------------------------------------------


def test_webnlg_trains_on_good_texts_and_judges_by_all():
    train, dev = load("webnlg", "train", "local"), load("webnlg", "dev", "local")
    assert [example.target for example in train] == [
        "Northfield Airport serves Northfield and has a runway of 1800.0 metres.",
        "Ada Quill plays folk music.",
    ]
    assert [len(example.references) for example in dev] == [2, 1]
    assert all(example.input.startswith(" | ") for example in train)


@pytest.mark.parametrize("name", ["webnlg", "dart"])
def test_a_triple_of_two_is_refused(name: str, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    texts = {"references": ["x"], "reference_comments": ["good"], "annotations": [{"text": "x"}], "category": "Food"}
    path.write_text(json.dumps({"triples": [["a", "b"]], "tripleset": [["a", "b"]], **texts}))
    with pytest.raises(DataError, match=r"line 1: .*expected at least one of subject"):
        get_task(name).load("dev", TaskConfig(name=name, dev=str(path)))


@pytest.mark.parametrize(
    ("act", "text"),
    [
        ("goodbye()", "goodbye"),
        ("?request(area)", "? request | area"),
        ("inform(name='a; b';food=thai)", "inform | name : a; b | food : thai"),
        ("inform(name='o'connor pub';food='x')", "inform | name : o'connor pub | food : x"),
        ("?select(area='';area=north)", "? select | area | area : north"),
    ],
)
def test_dialogue_acts(act: str, text: str):
    assert linearize_act(act) == text


@pytest.mark.parametrize("act", ["", "inform", "inform(", "inform(a b)", "(a=b)"])
def test_a_wrong_dialogue_act_is_refused(act: str):
    with pytest.raises(DataError, match="act"):
        linearize_act(act)


@given(st.text())
def test_padding_keeps_every_character_and_is_done_once(text: str):
    padded = pad_punctuation(text)
    assert "".join(padded.split()) == "".join(text.split())
    assert pad_punctuation(padded) == padded
    assert all(len(word) == 1 or (word.isascii() and word.replace("_", "a").isalnum()) for word in padded.split())


def test_padding_is_that_of_t5():
    assert pad_punctuation("It's 3.5%, Zoë_2!") == "It ' s 3 . 5 % , Zo ë _2 !"


# --- label words -----------------------------------------------------------------------------------------------------


def test_labels_are_read_by_name_id_and_truth_value():
    labels = Verbalizer(("False", "True"))
    for value, word in [(True, "True"), (0, "False"), ("True", "True"), ("1", "True"), (False, "False")]:
        assert labels.word({"label": value}) == word
    named = Verbalizer(("human", "number"), names=("HUM", "NUM"))
    assert named.word({"kind": "NUM"}, "kind") == "number"
    with pytest.raises(DataError, match=r"field 'kind' is 'human', which is no label: .*known: HUM, NUM"):
        named.word({"kind": "human"}, "kind")


def test_a_template_can_say_labels_in_words(tmp_path: Path):
    target = "{stars:0=very bad|1=very good}"
    assert template_words(target) == ("very bad", "very good")
    assert template_words("{stars}") == ()
    (example,) = template_format("{text}", target).read({"text": "x", "stars": 1}, "train")
    assert (example.target, example.choices) == ("very good", ("very bad", "very good"))
    rows = tmp_path / "rows.csv"
    rows.write_text("text,stars\nfine,1\nodd,2\n")
    config = TaskConfig(name="records", train=str(rows), format="{text}", target=target)
    assert get_task(config).choices == ("very bad", "very good")
    with pytest.raises(DataError, match=r"rows\.csv', line 3: field 'stars' is '2', which has no label word: .*0, 1"):
        get_task(config).load("train", config)


@pytest.mark.parametrize("target", ["{a:0=}", "{a:0=x|1}", "{a:=|=}", "{a:x}"])
def test_malformed_label_words_are_refused(target: str):
    with pytest.raises(ConfigError, match="target template"):
        template_format("{text}", target)
