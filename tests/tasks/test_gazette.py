"""The quickstart task: its files are what the program writes, and dev and test are new to who has seen train."""

import json
import runpy
from pathlib import Path

import pytest

from softprompts.tasks import SPLITS, get_task, read_records
from softprompts.tasks.catalog import gazette
from softprompts.tasks.encode import encode
from softprompts.types import Example

DATA = Path(gazette.__file__).parent / "data"
SCRIPT = Path(__file__).parents[2] / "scripts" / "make_gazette.py"


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Example]]:
    return {split: get_task("gazette").load(split) for split in SPLITS}


def slots(example: Example) -> dict[str, str]:
    return dict(part.split(" : ", 1) for part in example.input.split(" | "))


def test_the_program_writes_the_packaged_files(tmp_path: Path):
    write = runpy.run_path(str(SCRIPT), run_name="make_gazette")["main"]
    write(tmp_path)
    for split in SPLITS:
        name = f"gazette.{split}.jsonl.gz"
        assert read_records(tmp_path / name) == read_records(DATA / name)
    write(tmp_path / "again")
    for path in tmp_path.glob("*.gz"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_sizes(splits: dict[str, list[Example]]):
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 2000, "dev": 200, "test": 200}
    assert sum(path.stat().st_size for path in DATA.glob("gazette.*")) < 400_000
    for split in ("dev", "test"):
        assert {len(example.references) for example in splits[split]} == {2, 3, 4}
        assert all(len(set(example.references)) == len(example.references) for example in splits[split])
        assert len({slots(example)["kind"] for example in splits[split]}) == 5


def test_names_and_leading_pairs_are_new_in_dev_and_test(splits: dict[str, list[Example]]):
    """The second slot is the name, the third and fourth are the pair."""

    def seen(split: str, first: int, last: int) -> set[tuple[str, ...]]:
        return {(slots(e)["kind"], *list(slots(e).values())[first:last]) for e in splits[split]}

    for first, last in [(1, 2), (2, 4)]:
        train, dev, test = (seen(split, first, last) for split in SPLITS)
        assert train.isdisjoint(dev)
        assert train.isdisjoint(test)
        assert dev.isdisjoint(test)


def test_nothing_leaks(splits: dict[str, list[Example]]):
    inputs = [{example.input for example in splits[split]} for split in SPLITS]
    texts = [{text for example in splits[split] for text in example.all_references} for split in SPLITS]
    # The first sentence holds what is new: none of them may be known either.
    openers = [{text.split(". ")[0] for text in split} for split in texts]
    for kind in (inputs, texts, openers):
        assert kind[0].isdisjoint(kind[1])
        assert kind[0].isdisjoint(kind[2])
        assert kind[1].isdisjoint(kind[2])
    assert len(inputs[0]) == 2000


def test_every_value_is_said_in_every_reference(splits: dict[str, list[Example]]):
    for example in (example for examples in splits.values() for example in examples):
        values = [value for key, value in slots(example).items() if key != "kind"]
        for text in example.all_references:
            assert all(value in text for value in values), (example.input, text)


def test_words_are_few_and_texts_short(splits: dict[str, list[Example]]):
    texts = [text for examples in splits.values() for e in examples for text in e.all_references]
    assert max(len(text.split()) for text in texts) <= 36
    assert 15 <= sum(len(text.split()) for text in texts) / len(texts) <= 30
    assert len({word for text in texts for word in text.split()}) < 600
    assert all(text.isascii() for text in texts)


def test_the_layout_is_plain_text_on_two_lines():
    example = Example("kind : boat", "A boat.")
    row = encode(example, get_task("gazette").format, lambda t: list(t.encode()), eos_id=999, max_length=99)
    assert row.ids == (*b"kind : boat\nA boat.", 999)


def test_ids_are_unique_and_the_file_is_plain_jsonl(splits: dict[str, list[Example]]):
    ids = [example.id for examples in splits.values() for example in examples]
    assert len(set(ids)) == len(ids)
    first = read_records(DATA / "gazette.dev.jsonl.gz")[0]
    assert set(json.loads(json.dumps(first))) == {"id", "input", "references"}
