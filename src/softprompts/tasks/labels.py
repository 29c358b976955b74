"""Classification as text: label words (the verbalizer), and inputs of the form ``sentence1: ... sentence2: ...``.

The form and the words are those of T5's preprocessors for GLUE and SuperGLUE, which the prompt-tuning paper (Lester et
al. 2021) took over without the task's name in front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from softprompts.config import DecodingConfig
from softprompts.errors import DataError, nearest
from softprompts.tasks.formats import TextFormat, field, text_field
from softprompts.types import UNLABELLED, Example

__all__ = ["LABEL_DECODING", "Verbalizer", "keyed_format", "keyed_text"]

LABEL_DECODING = DecodingConfig(strategy="greedy", max_new_tokens=16)
"""A label word is a few tokens; the most that byte-level tokenizers need for those of the catalog."""


@dataclass(frozen=True)
class Verbalizer:
    """The words that a model says for labels."""

    words: tuple[str, ...]
    """By label id."""
    names: tuple[str, ...] = ()
    """How records spell the labels, by label id; empty means like the words."""

    def word(self, record: Mapping[str, Any], name: str = "label") -> str:
        """Return the word for the label in a field: its name, its id, or a truth value.

        Raises:
            DataError: The field is missing, or holds none of the labels.
        """
        value = field(record, name)
        names = self.names or self.words
        text = str(value)
        if text in names:
            return self.words[names.index(text)]
        if isinstance(value, int) and 0 <= value < len(self.words):
            return self.words[value]
        if text.isdecimal() and int(text) < len(self.words):  # an id in a CSV file
            return self.words[int(text)]
        secret = " (-1: the data set keeps the labels of this split secret)" if value == -1 else ""
        raise DataError(f"field '{name}' is {value!r}, which is no label{secret}: {nearest(text, names)}")

    def answer(self, record: Mapping[str, Any], split: str, name: str = "label") -> str:
        """Return :meth:`word`, or of a test split whose labels are kept secret :data:`~softprompts.types.UNLABELLED`.

        Raises:
            DataError: The field is missing, or holds none of the labels.
        """
        if split == "test" and (name not in record or record[name] in (-1, "-1", None)):
            return UNLABELLED
        return self.word(record, name)


def keyed_text(record: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return ``key: text key: text`` of the named fields, in this order."""
    return " ".join(f"{key}: {text_field(record, key)}" for key in keys)


def keyed_format(keys: Sequence[str], labels: Verbalizer, tail: str | None = None) -> TextFormat:
    """Make the format of a classification task whose input is some named fields.

    Args:
        keys: The fields.
        labels: Words for the labels.
        tail: The last of the fields, where truncation should cut those in front of it first.
    """

    def read(record: Mapping[str, Any], split: str) -> list[Example]:
        spared = "" if tail is None else f" {keyed_text(record, (tail,))}"
        return [Example(keyed_text(record, keys), labels.answer(record, split), tail=spared)]

    return TextFormat(read)
