"""WSC of SuperGLUE (Levesque et al. 2012): what a pronoun stands for.

As in T5's simplified form: the pronoun is marked, ``the cup broke because *it* was thin``, and the answer is the noun
phrase. A record has a phrase and says whether it is the right one: training takes those where it is (259 of 554),
evaluation takes all and asks whether the prediction is that phrase just where it should be. For that the references are
the label and the phrase. There being no label words, the paper starts its prompt from commonsense, pronoun, resolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from softprompts.config import DecodingConfig
from softprompts.errors import DataError
from softprompts.tasks.formats import TextFormat, field, text_field
from softprompts.tasks.labels import Verbalizer
from softprompts.tasks.sources import hub_splits
from softprompts.tasks.task import Source, Task, register
from softprompts.types import Example

__all__ = ["WSC", "mark_pronoun"]

_LABELS = Verbalizer(("False", "True"))
_FOLDER = "research_only/superglue/WSC"


def mark_pronoun(text: str, pronoun: str, index: int) -> str:
    """Mark the word at ``index`` with asterisks.

    Two records of the data set do not have their pronoun as a whole word at the index that they give (one has
    punctuation at it, one is off by a word); T5 spells both out, this takes the nearest word that begins with it.

    Raises:
        DataError: No word begins with the pronoun.
    """
    words = text.split(" ")  # blanks at the end and in a row stay, as in T5
    if index >= len(words) or words[index] != pronoun:
        words = text.split()
        index = _nearest_word(words, pronoun, index)
    rest = words[index][len(pronoun) :]
    return " ".join([*words[:index], f"*{pronoun}*", *([rest] if rest else []), *words[index + 1 :]])


def _nearest_word(words: Sequence[str], pronoun: str, index: int) -> int:
    def stands_at(at: int) -> bool:
        rest = words[at].removeprefix(pronoun)
        return words[at].startswith(pronoun) and not rest[:1].isalnum()

    places = [at for at in range(len(words)) if stands_at(at)]
    if not places:
        raise DataError(f"the pronoun {pronoun!r} (span2_text) is not in the text")
    return min(places, key=lambda at: abs(at - index))


def _read(record: Mapping[str, Any], split: str) -> list[Example]:
    """Read a record whose spans are below ``target`` (official JSONL), or beside the text (hub)."""
    spans = field(record, "target") if "target" in record else record
    index = field(spans, "span2_index")
    if not isinstance(index, int):
        raise DataError(f"field 'span2_index' is {index!r}, expected the number of a word")
    label, phrase = _LABELS.answer(record, split), text_field(spans, "span1_text")
    if split == "train" and label == "False":
        return []
    text = mark_pronoun(text_field(record, "text"), text_field(spans, "span2_text"), index)
    return [Example(text, phrase, references=() if split == "train" else (label, phrase))]


WSC = register(
    Task(
        name="superglue_wsc",
        description="what a pronoun stands for",
        format=TextFormat(_read),
        source=Source(
            local={"train": f"{_FOLDER}/train.jsonl", "dev": f"{_FOLDER}/val.jsonl"},
            hub=hub_splits("aps/super_glue", "wsc", train="train", dev="validation"),
        ),
        metrics=("wsc_accuracy",),
        selection="wsc_accuracy",
        decoding=DecodingConfig(max_new_tokens=32),
        prompt_words=("commonsense", "pronoun", "resolution"),
    )
)
