"""From a record to an :class:`Example`, and from an example to the segments that are tokenised.

A format has two halves. ``read`` turns a raw record (a mapping with the fields of the data set) into examples of
plain text; ``segments`` puts the pieces of one example in order: input, separator, target, end. The pieces are
tokenised one by one and joined (see :mod:`softprompts.tasks.encode`), so the model sees the same tokens before the
target whether or not a target follows. That is why leading spaces are part of the format: a byte-level BPE word
carries the space in front of it, so the space belongs to the piece that it begins, never to the end of the one before.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from softprompts.errors import ConfigError, DataError, nearest
from softprompts.types import Example, Segment

__all__ = [
    "END_TOKEN",
    "Format",
    "TextFormat",
    "field",
    "parse_separator",
    "template_format",
    "template_words",
    "text_field",
    "texts_field",
]

END_TOKEN = "<end token>"
"""As the text of a separator or an end segment: the tokenizer's end-of-sequence id, whatever it is called there."""

_DEFAULT_SEPARATOR = "\n"
_MISSING = object()
_LABELS = re.compile(r"\{([^{}:!]+):([^{}]*=[^{}]*)\}")
"""A target template that says labels in words."""


class Format(Protocol):
    """How records of a task become text, and how that text is laid out."""

    @property
    def read(self) -> Callable[[Mapping[str, Any], str], Sequence[Example]]:
        """``read(record, split)``: the examples in one record; raises DataError for a record that is wrong."""
        ...

    def segments(self, example: Example) -> tuple[Segment, ...]:
        """Return the pieces in order: input, separator, target, end."""
        ...


@dataclass(frozen=True)
class TextFormat:
    """``input_lead + input``, ``separator``, ``target_lead + target``, end token.

    The separator is text (default: a newline, which every language model knows) or :data:`END_TOKEN`, the
    end-of-sequence id as separator, as in the prefix-tuning paper's GPT-2 rows (BOS = EOS = ``<|endoftext|>``).
    It works for any tokenizer that has an end-of-sequence id; no other special token is needed.
    """

    read: Callable[[Mapping[str, Any], str], Sequence[Example]]
    separator: str = _DEFAULT_SEPARATOR
    input_lead: str = ""
    target_lead: str = ""

    def segments(self, example: Example) -> tuple[Segment, ...]:
        """Lay one example out. The input segment is the one that truncation cuts."""
        return (
            Segment(self.input_lead + example.input, "input"),
            Segment(self.separator, "separator"),
            Segment(self.target_lead + example.target, "target"),
            Segment(END_TOKEN, "end"),
        )

    def with_separator(self, separator: str) -> TextFormat:
        """Return this format with another separator; the target then begins with a space unless after a line break."""
        separator, lead = _separator_and_lead(separator)
        return replace(self, separator=separator, target_lead=lead)

    def with_target_prefix(self, prefix: str) -> TextFormat:
        """Return this format with a mark, such as a sentinel of T5, and a space in front of every target."""
        return replace(self, target_lead=f"{prefix} ")


def parse_separator(text: str) -> str:
    r"""Read a separator as a user writes it: ``eos`` is the end token, ``\n`` and ``\t`` are what they look like."""
    if text == "eos":
        return END_TOKEN
    separator = text.replace("\\n", "\n").replace("\\t", "\t")
    if not separator:
        raise ConfigError("the separator is empty; give a text such as '\\n' or ' =>', or 'eos' for the end token")
    return separator


def _separator_and_lead(written: str) -> tuple[str, str]:
    """Move the space at the end of a separator (``" => "``) to the start of the target, where its word wants it."""
    return written.rstrip(" "), "" if written.endswith(("\n", "\t")) else " "


# --------------------------------------------------------------------------------------------------------------------
# Fields
# --------------------------------------------------------------------------------------------------------------------


def field(record: Mapping[str, Any], name: str) -> Any:
    """Return a field of a record; ``a.b`` reaches into a nested one.

    Raises:
        DataError: The record has no such field; the message names the fields that exist.
    """
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        value = value.get(part, _MISSING) if isinstance(value, Mapping) else _MISSING
        if value is _MISSING:
            raise DataError(f"field '{name}' is missing: {nearest(name, record)}")
    return value


def text_field(record: Mapping[str, Any], name: str) -> str:
    """Return a field as text; numbers and truth values are written out.

    Raises:
        DataError: The field is missing, empty (null) or neither text nor a number.
    """
    value = field(record, name)
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)):
        return str(value)
    raise DataError(f"field '{name}' is {value!r} of type {type(value).__name__}, expected text")


def texts_field(record: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return a field that holds a list of texts.

    Raises:
        DataError: The field is missing, or is no list of at least one text.
    """
    value = field(record, name)
    if isinstance(value, (list, tuple)) and value and all(isinstance(text, str) for text in value):
        return tuple(value)
    raise DataError(f"field '{name}' is {value!r}, expected a list of at least one text")


# --------------------------------------------------------------------------------------------------------------------
# Templates
# --------------------------------------------------------------------------------------------------------------------


def template_format(input_template: str, target_template: str) -> TextFormat:
    """Make a format from two templates: ``"Review: {text} Sentiment:"`` and ``"{label}"``.

    What stands behind the last field of the input template (``" Sentiment:"``) becomes the separator: it is kept when a
    long input is cut. Where nothing stands there the separator is a newline. ``{{`` and ``}}`` are literal braces,
    ``{a.b}`` is a nested field. If the target template is one field and that field is a list of texts, they
    are the references. ``{label:0=negative|1=positive}`` as the target says labels in words, and refuses any other.

    Args:
        input_template: Template of the input, with at least one field.
        target_template: Template of the target, with at least one field.

    Raises:
        ConfigError: A template is malformed or names no field.
    """
    parts = _parse_template(input_template, "input")
    tail = parts.pop()[0] if parts[-1][1] is None else ""
    answers = _target_reader(target_template)

    def read(record: Mapping[str, Any], split: str) -> list[Example]:
        identity = record.get("id", "")
        texts, choices = answers(record)
        return [
            Example(
                _fill(parts, record),
                texts[0],
                references=texts if len(texts) > 1 else (),
                choices=choices,
                id=str(identity) if isinstance(identity, (str, int)) else "",
            )
        ]

    separator, lead = _separator_and_lead(tail if tail.strip(" ") else _DEFAULT_SEPARATOR)
    return TextFormat(read, separator, target_lead=lead)


def template_words(target_template: str) -> tuple[str, ...]:
    """Return the label words of a target template such as ``{label:0=negative|1=positive}``; others have none."""
    labels = _LABELS.fullmatch(target_template)
    return tuple(_words(labels[2], target_template).values()) if labels else ()


def _target_reader(template: str) -> Callable[[Mapping[str, Any]], tuple[tuple[str, ...], tuple[str, ...]]]:
    """``read(record)``: the answers in a record, and the legal ones where the template lists them."""
    if labels := _LABELS.fullmatch(template):
        name, words = labels[1], _words(labels[2], template)

        def labelled(record: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
            label = text_field(record, name)
            if label not in words:
                raise DataError(f"field '{name}' is '{label}', which has no label word: {nearest(label, words)}")
            return (words[label],), tuple(words.values())

        return labelled
    target = _parse_template(template, "target")
    list_field = target[0][1] if len(target) == 1 and not target[0][0] else None

    def written(record: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        if list_field is not None and isinstance(field(record, list_field), (list, tuple)):
            return texts_field(record, list_field), ()
        return (_fill(target, record),), ()

    return written


def _words(pairs: str, template: str) -> dict[str, str]:
    words = dict(pair.split("=", 1) for pair in pairs.split("|") if "=" in pair)
    if len(words) < pairs.count("|") + 1 or not all(word.strip() for word in words.values()):
        raise ConfigError(f"target template {template!r}: labels are written {{name:0=negative|1=positive}}")
    return words


def _parse_template(template: str, what: str) -> list[tuple[str, str | None]]:
    """Split into ``(literal, field)`` pairs; the last field is None where text stands behind the last one."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"{what} template {template!r} is malformed ({error}); a literal brace is '{{{{'") from error
    parts: list[tuple[str, str | None]] = []
    literal = ""
    for text, name, spec, conversion in parsed:
        literal += text
        if name is None:
            continue
        if not name or spec or conversion:
            raise ConfigError(f"{what} template {template!r}: a field is written {{name}}, without '!' or ':'")
        parts.append((literal, name))
        literal = ""
    if not parts:
        raise ConfigError(f"{what} template {template!r} names no field; expected one such as {{text}}")
    return [*parts, (literal, None)] if literal else parts


def _fill(parts: Sequence[tuple[str, str | None]], record: Mapping[str, Any]) -> str:
    return "".join(literal + (text_field(record, name) if name is not None else "") for literal, name in parts)
