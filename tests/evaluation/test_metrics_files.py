"""Files of predictions and references: the official formats, and each mistake named with file and line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from softprompts.errors import DataError, DataNotFoundError
from softprompts.evaluation.alignment import align, with_choices
from softprompts.evaluation.score_files import Gold, read_predictions, read_references


@pytest.fixture
def file(tmp_path: Path):
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def jsonl(*records: object) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


# --------------------------------------------------------------------------------------------------------------------
# Formats
# --------------------------------------------------------------------------------------------------------------------


def test_lines_are_texts_and_an_empty_line_is_an_empty_text(file):
    found = read_predictions(file("out.txt", "one\r\n\ntwo\u2028three\n"))
    assert found.texts == ("one", "", "two\u2028three")
    assert found.lines == (1, 2, 3)


def test_a_byte_order_mark_is_no_text(file):
    assert read_predictions(file("out.txt", b"\xef\xbb\xbfone\n")).texts == ("one",)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("out.tsv", "mr\toutput\nname[A]\tA is a pub.\nname[B]\tB, too.\n"),
        ("out.csv", 'MR,ref\n"name[A], x[y]",A is a pub.\nname[B],"B, too."\n'),
    ],
)
def test_tables_of_e2e(name: str, content: str, file):
    found = read_predictions(file(name, content))
    assert found.texts == ("A is a pub.", "B, too.")
    assert found.lines == (2, 3)


def test_a_table_of_references_is_grouped_by_meaning(file):
    gold = read_references([file("refs.csv", "mr,ref\nname[A],one\nname[A],two\nname[B],three\n")])
    assert gold.references == (("one", "two"), ("three",))


def test_tables_are_aligned_by_meaning(file):
    gold = read_references([file("refs.csv", "mr,ref\nname[A],one\nname[A],two\nname[B],three\n")])
    out = read_predictions(file("out.tsv", "MR\toutput\nname[B]\tthird\n name[A]\tfirst\n"))
    assert align(out, gold) == ("first", "third")
    assert align(out, replace(gold, meanings=())) == ("third", "first")  # from blocks: they have an order only
    for content, message in (
        ("mr,output\nname[B],x\nname[B],y\n", r"out.csv', line 3: meaning 'name\[B\]' was there before"),
        ("mr,output\nname[B],x\nname[C],y\n", r"none for 'name\[A\]' \(1 of 2"),
        ("mr,output\nname[B],x\nname[A],y\nname[C],z\n", r"line 4: 'name\[C\]' is no record"),
    ):
        with pytest.raises(DataError, match=message):
            align(read_predictions(file("out.csv", content)), gold)


def test_squad(file):
    article = {"paragraphs": [{"qas": [{"id": "q1", "answers": [{"text": "a"}, {"text": "b"}]}]}]}
    gold = read_references([file("dev.json", json.dumps({"data": [article]}))])
    assert (gold.ids, gold.references) == (("q1",), (("a", "b"),))
    predicted = read_predictions(file("out.json", '{"q1": "b"}'))
    assert align(predicted, gold) == ("b",)


def test_superglue(file):
    gold = read_references([file("val.jsonl", jsonl({"idx": 1, "label": False}, {"idx": 0, "label": True}))])
    gold = with_choices(gold, ("False", "True"))
    assert gold.references == (("False",), ("True",))
    predicted = read_predictions(file("BoolQ.jsonl", jsonl({"idx": 0, "label": "true"}, {"idx": 1, "label": True})))
    assert align(predicted, gold) == ("True", "True")


def test_labels_may_be_numbers(file):
    gold = with_choices(read_references([file("val.jsonl", jsonl({"idx": 0, "label": 1}))]), ("choice1", "choice2"))
    assert gold.references == (("choice2",),)
    assert align(read_predictions(file("COPA.jsonl", jsonl({"idx": 0, "label": 0}))), gold) == ("choice1",)


def test_multirc_is_nested(file):
    answers = [{"idx": 4, "label": 1}, {"idx": 5, "label": 0}]
    nested = {"idx": 3, "passage": {"questions": [{"idx": 7, "answers": answers}]}}
    predicted = read_predictions(file("MultiRC.jsonl", jsonl(nested)))
    assert (predicted.ids, predicted.texts) == (("3-7-4", "3-7-5"), ("1", "0"))
    assert read_references([file("val.jsonl", jsonl(nested))]).references == (("1",), ("0",))


def test_numbers_stand_for_the_ids_that_a_task_makes_of_them(file):
    gold = Gold("the dev split", (("a",), ("b",)), ("superglue_rte-dev-0", "superglue_rte-dev-1"))
    predicted = read_predictions(file("out.jsonl", jsonl({"idx": 1, "label": "b"}, {"idx": 0, "label": "a"})))
    assert align(predicted, gold) == ("a", "b")


def test_answers_as_the_hub_keeps_those_of_squad(file):
    path = file("squad.jsonl", jsonl({"id": "x", "answers": {"text": ["A", "B"], "answer_start": [1, 2]}}))
    assert read_references([path]).references == (("A", "B"),)


def test_samples_of_evaluate_are_predictions_and_references(file):
    path = file("samples.jsonl", jsonl({"id": "x", "prediction": "p", "references": ["r", "s"], "input": "i"}))
    assert read_predictions(path).texts == ("p",)
    assert read_references([path]).references == (("r", "s"),)


def test_blocks_of_references(file):
    gold = read_references([file("refs.txt", "a1\na2\n\nb1\n\nc1\nc2\n\n")])
    assert gold.references == (("a1", "a2"), ("b1",), ("c1", "c2"))


def test_empty_lines_at_the_end_make_no_block_of_plain_references(file):
    gold = read_references([file("refs.txt", "a\nb\nc\n\n")])
    assert gold.references == (("a",), ("b",), ("c",))


def test_an_empty_line_of_a_parallel_file_is_a_missing_reference(file):
    gold = read_references([file("ref0", "a\nb\n"), file("ref1", "\nb2\n"), file("ref2", "a3\n \n")])
    assert gold.references == (("a", "a3"), ("b", "b2"))


# --------------------------------------------------------------------------------------------------------------------
# Mistakes
# --------------------------------------------------------------------------------------------------------------------

THREE = Gold("'refs.txt'", (("a",), ("b",), ("c",)))


def test_empty_lines_at_the_end_are_forgiven(file):
    assert align(read_predictions(file("out.txt", "a\nb\n\n\n\n")), THREE) == ("a", "b", "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb\n", r"too few predictions: '.*out.txt' ends after line 2 with 2, expected 3"),
        ("", r"too few predictions: '.*out.txt' ends after line 0 with 0, expected 3"),
        ("a\nb\nc\nd\n", r"too many predictions: '.*out.txt', line 4 is number 4, expected 3"),
        (b"a\ncaf\xe9\nc\n", r"'.*out.txt', line 2: byte 0xe9 at position 4 is not UTF-8"),
    ],
)
def test_wrong_lines_are_named(content: str | bytes, message: str, file):
    with pytest.raises(DataError, match=message):
        align(read_predictions(file("out.txt", content)), THREE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (jsonl({"idx": 0, "label": "a"}, {"idx": 1}), r"out.jsonl', line 2: a field is missing: .*'label'.* got idx"),
        (jsonl({"idx": 0, "label": ["a"]}), r"out.jsonl', line 1: field 'label' is \['a'\], expected text"),
        (jsonl({"idx": 0, "label": "a"}) + "{\n", r"out.jsonl', line 2: no valid JSON"),
        ("[1]\n", r"out.jsonl', line 1: got a JSON list, expected an object"),
        (jsonl({"idx": 0, "label": "a"}), r"has 1 and none for 'x-1' \(1 of 2"),
        (jsonl(*({"idx": i, "label": "a"} for i in range(3))), r"out.jsonl', line 3: '2' is no record"),
        (jsonl({"idx": 0, "label": "a"}, {"idx": 0, "label": "a"}), r"out.jsonl', line 2: id '0' was there before"),
        (jsonl({"idx": 0, "label": "a"}, {"idx": 1, "label": "z"}), r"out.jsonl', line 2: the label 'z' is none of"),
        (jsonl({"idx": 0, "passage": {"questions": [{"idx": 0}]}}), r"line 1: field 'answers' is missing"),
    ],
)
def test_wrong_records_are_named(content: str, message: str, file):
    gold = with_choices(Gold("the dev split", (("a",), ("b",)), ("x-0", "x-1")), ("a", "b"))
    message = message.replace("'x-1'", "'1'")
    with pytest.raises(DataError, match=message):
        align(read_predictions(file("out.jsonl", content)), gold)


def test_labels_outside_the_task_can_be_let_pass(file):
    gold = with_choices(Gold("refs", (("a",),)), ("a", "b"))
    predicted = read_predictions(file("out.txt", "nonsense\n"))
    with pytest.raises(DataError, match=r"out.txt', line 1: the label 'nonsense' is none of the task's: known: a, b"):
        align(predicted, gold)
    assert align(predicted, gold, lenient=True) == ("nonsense",)
    with pytest.raises(DataError, match="label number 1 is 'c', none of the task's"):
        with_choices(Gold("refs", (("c",),)), ("a", "b"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("refs.txt", "a\n\n\nb\n", r"refs.txt', line 3: a record has no reference"),
        ("refs.jsonl", jsonl({"references": ["a"]}, {"references": []}), r"line 2: field 'references' is \[\]"),
        ("refs.jsonl", jsonl({"answers": [{"answer": "x"}]}), r"line 1: field 'answers' is \[\{'answer': 'x'\}\]"),
        ("refs.jsonl", jsonl({"answers": {"text": [], "answer_start": []}}), r"field 'answers' is \{'text': \[\]"),
        ("refs.jsonl", jsonl({"references": ["a", ""]}), r"line 1: field 'references' is \['a', ''\]"),
        (
            "refs.jsonl",
            jsonl({"id": 1, "text": "a"}),
            r"line 1: a field is missing: expected 'references', got id, text",
        ),
        ("refs.json", '{"data": [{"paragraphs": [{"qas": [{"id": "q"}]}]}]}', r"refs.json' is not in SQuAD's format"),
        ("refs.json", '{"data": [{"paragraphs": [{"qas": [{"id": "q", "answers": []}]}]}]}', r"'q' has an empty list"),
        ("refs.csv", "a,b\n1,2\n", r"refs.csv', line 1: the columns \['a', 'b'\] need one of meanings"),
        ("refs.tsv", "mr\tref\nx\n", r"refs.tsv', line 2: got 1 columns, expected 2"),
    ],
)
def test_wrong_references_are_named(name: str, content: str, message: str, file):
    with pytest.raises(DataError, match=message):
        read_references([file(name, content)])


def test_wrong_parallel_references_are_named(file):
    with pytest.raises(DataError, match=r"ref1' ends after line 1, other files of references after line 2"):
        read_references([file("ref0", "a\nb\n"), file("ref1", "a\n")])
    with pytest.raises(DataError, match=r"ref0', line 2: the line is empty in every file"):
        read_references([file("ref0", "a\n\n"), file("ref1", "a\n \n")])


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(DataNotFoundError, match=r"nothing.txt' does not exist"):
        read_predictions(tmp_path / "nothing.txt")
    with pytest.raises(DataError, match="cannot be read"):
        read_predictions(tmp_path)


def test_squad_predictions_must_be_texts(file):
    with pytest.raises(DataError, match="the answer of 'q' is 3, expected text"):
        read_predictions(file("out.json", '{"q": 3}'))
    with pytest.raises(DataError, match="holds a JSON list"):
        read_predictions(file("out.json", "[]"))
