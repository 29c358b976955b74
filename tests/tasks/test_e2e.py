"""E2E NLG in the official code's format."""

import json
import re
from pathlib import Path

import datasets
import pytest

from softprompts.config import TaskConfig
from softprompts.errors import DataError
from softprompts.tasks import data_root, get_task
from softprompts.tasks.catalog.e2e import linearize
from softprompts.tasks.encode import encode

ALL = (
    "name[The Punter], eatType[pub], food[Fast food], priceRange[less than £20], customer rating[3 out of 5], "
    "area[city centre], familyFriendly[no], near[Café Rouge]"
)


def test_keys_are_renamed_as_in_the_paper():
    assert linearize(ALL) == (
        "name : The Punter | Type : pub | food : Fast food | price : less than £20 | customer rating : 3 out of 5 | "
        "area : city centre | family friendly : no | near : Café Rouge"
    )
    assert linearize("name[A], customerrating[low]") == "name : A | customer rating : low"


@pytest.mark.parametrize(
    "meaning", ["", "name", "name[A", "name[A] food[B]", "name[A], colour[red]", "name[A], x", "[A]"]
)
def test_a_wrong_meaning_is_refused(meaning: str):
    with pytest.raises(DataError, match="is no list of key"):
        linearize(meaning)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "e2e").mkdir()
    rows = [{"id": "e-0", "mr": "name[A], area[riverside]", "references": ["A is  there.", "There is A."]}]
    rows += [{"id": "e-1", "mr": "name[B]", "references": ["B."]}]
    for split in ("train", "dev"):
        (tmp_path / "e2e" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("SOFTPROMPTS_DATA", str(tmp_path))
    return tmp_path


def test_rows(folder: Path):
    train, dev = get_task("e2e").load("train"), get_task("e2e").load("dev")
    assert [(e.id, e.input, e.target) for e in train] == [
        ("e-0-0", "name : A | area : riverside", "A is there."),
        ("e-0-1", "name : A | area : riverside", "There is A."),
        ("e-1", "name : B", "B."),
    ]
    assert [(e.id, e.references) for e in dev] == [("e-0", ("A is there.", "There is A.")), ("e-1", ("B.",))]


def test_a_row_is_encoded_as_in_the_official_code(folder: Path):
    """``' {src} {bos} ' + tgt + ' {eos}'``, where the byte-level BPE puts the spaces in front of the words."""
    task = get_task("e2e")
    row = encode(task.load("train")[2], task.format, lambda t: list(t.encode()), eos_id=999, max_length=99)
    assert row.ids == (*b" name : B", 999, *b" B.", 999)
    assert row.ids[row.target_start :] == (*b" B.", 999)


def test_the_separator_can_be_text(folder: Path):
    config = TaskConfig(name="e2e", separator=r"\n")
    task = get_task(config)
    row = encode(task.load("train", config)[2], task.format, lambda t: list(t.encode()), eos_id=999, max_length=99)
    assert row.ids == (*b" name : B\nB.", 999)


@pytest.mark.parametrize("references", [None, "text", [], [1], ["fine", ""]])
def test_wrong_references_are_refused_with_the_line(folder: Path, references: object):
    row = {"id": "e-0", "mr": "name[A]", "references": references}
    (folder / "e2e" / "dev.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"dev\.jsonl', line 1: .*(references|target)"):
        get_task("e2e").load("dev")


def test_the_hub_has_a_row_per_reference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    rows = [
        {"meaning_representation": meaning, "human_reference": reference}
        for meaning, reference in [("name[A]", "A."), ("name[B]", "B."), ("name[A]", "It is A.")]
    ]
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setenv("SOFTPROMPTS_DATA", str(tmp_path))
    examples = get_task("e2e").load("test")
    assert [(e.input, e.all_references) for e in examples] == [("name : A", ("A.", "It is A.")), ("name : B", ("B.",))]
    assert asked == [(("tuetschek/e2e_nlg", None), {"revision": "refs/convert/parquet"})]


@pytest.mark.data
def test_the_real_files_have_the_published_sizes():
    root = data_root()
    if root is None or not (root / "e2e" / "train.jsonl").is_file():
        pytest.skip("the E2E files are not there: set SOFTPROMPTS_DATA")
    train, dev = get_task("e2e").load("train"), get_task("e2e").load("dev")
    assert (len(train), len({e.input for e in train})) == (42_061, 4_862)
    assert (len(dev), sum(len(e.references) for e in dev)) == (547, 4_672)
    assert {e.input for e in dev}.isdisjoint(e.input for e in train)


@pytest.mark.data
def test_the_training_lines_are_built_as_in_the_paper():
    """All 42,061: ``' name : ... | Type : ... '``, the end token, ``' text'``, the end token; 4,672 pairs of dev."""
    root = data_root()
    if root is None or not (root / "e2e" / "train.jsonl").is_file():
        pytest.skip("the E2E files are not there: set SOFTPROMPTS_DATA")
    task = get_task("e2e")
    key = "name|Type|price|customer rating|near|food|area|family friendly"
    line = re.compile(rf" (?:{key}) : [^|]+(?: \| (?:{key}) : [^|]+)*<end token> \S.*<end token>", re.DOTALL)
    lines = ["".join(segment.text for segment in task.format.segments(example)) for example in task.load("train")]
    assert len(lines) == 42_061
    assert [text for text in lines if not line.fullmatch(text)] == []
    # The paper's dev file has a line per pair; here a meaning has its references together.
    pairs = [(example.input, reference) for example in task.load("dev") for reference in example.references]
    assert len(pairs) == 4_672
