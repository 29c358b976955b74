from __future__ import annotations

import random
import re

import pytest

from softprompts.pretraining.objectives import OBJECTIVES, Context, invent_name, split_sentences

TEXT = (
    "Ludwig Hart was born in Vienna in 1834 and studied music there.\n"
    "He moved to New York with Anna Berg and opened a small theatre.\n"
    "The theatre in New York closed on 3 May 1871 after a fire."
)


def run(name: str, seed: int, text: str = TEXT) -> list[str]:
    return OBJECTIVES.get(name)(text, Context(random.Random(seed)))


def test_plain_is_the_text() -> None:
    assert run("plain", 0) == [TEXT]


def test_sentences_lose_their_speaker_labels() -> None:
    assert split_sentences("U: Hello there. Is it open?\nS: Yes.") == ["Hello there.", "Is it open?", "Yes."]


@pytest.mark.parametrize("seed", range(30))
def test_every_value_of_a_record_stands_in_its_sentence(seed: int) -> None:
    """Bare values are the plain case to check: whatever was replaced was replaced on both sides."""
    sentence = "Ludwig Hart was born in Vienna in 1834 and studied music there."
    (document,) = run("records", seed, sentence)
    for value in ("Vienna", "Ludwig Hart", "1834"):
        # A name is on both sides or, replaced by another one, on neither.
        assert document.count(value) in (0, 2)
    assert document.count("1834") == 2
    assert document.rstrip(".").endswith("there")


def test_names_are_replaced_in_part() -> None:
    sentence = "He moved to Vienna with Anna Berg and opened a small theatre."
    kept = sum("Vienna" in run("records", seed, sentence)[0] for seed in range(300)) / 300
    assert 0.6 < kept < 0.85  # 40 % are replaced, now and then by the other name of the sentence


def test_forms_vary_and_a_document_keeps_to_one() -> None:
    firsts = {run("records", seed)[0] for seed in range(40)}
    assert len(firsts) == 40
    separators = {s for text in firsts for s in (" | ", "; ", " / ", " || ") if s in text}
    assert len(separators) >= 3


def test_text_without_names_gives_no_record() -> None:
    assert run("records", 0, "it rained.\nyes.") == []


@pytest.mark.parametrize("seed", range(20))
def test_lookup_restates_only_what_its_record_says(seed: int) -> None:
    (document,) = run("lookup", seed)
    restated = re.findall(r"The (\S+) is (.+?)\.(?=[ ;\n]|$)", document)
    for key, value in restated:
        assert document.count(value) >= 2
        assert document.count(key) >= 2


def is_repetition(document: str) -> bool:
    """Whether the document is one item, twice or three times, with one marker between."""
    for times in (2, 3):
        for marker in ("\n\n", "\n", " | ", " = ", "\nAgain: "):
            size, left = divmod(len(document) - (times - 1) * len(marker), times)
            if left == 0 and document == marker.join([document[:size]] * times):
                return True
    return False


def test_repetition_repeats() -> None:
    documents = [document for seed in range(30) for document in run("repetition", seed)]
    assert len(documents) == 60
    assert all(map(is_repetition, documents))
    assert not is_repetition(TEXT)


def test_invented_names_differ() -> None:
    rng = random.Random(0)
    names = {invent_name(rng) for _ in range(500)}
    assert len(names) > 490
    assert all(name[0].isupper() for name in names)
