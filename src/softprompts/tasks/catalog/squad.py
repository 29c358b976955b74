"""SQuAD 1.1 (Rajpurkar et al. 2016): the answer to a question is a span of a paragraph. CC BY-SA 4.0.

Format as in T5's preprocessor: ``question: ... context: ...`` with spaces around every character that is no ASCII
letter, digit or underscore (its regular expressions know no others), in the answers too; training learns the first
answer, evaluation takes all. Trained on this and judged on the six out-of-domain sets of MRQA: the prompt-tuning
paper's domain shift.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from softprompts.config import DecodingConfig
from softprompts.errors import DataError
from softprompts.tasks.formats import TextFormat, field, text_field
from softprompts.tasks.sources import hub_splits
from softprompts.tasks.task import Source, Task, register
from softprompts.types import Example

__all__ = ["ANSWER_DECODING", "SQUAD", "answer_texts", "pad_punctuation", "question_example"]

ANSWER_DECODING = DecodingConfig(strategy="greedy", max_new_tokens=64)


def pad_punctuation(text: str) -> str:
    """Put spaces around everything but ASCII letters, digits and underscores, and make runs of blanks one."""
    return " ".join(re.sub(r"(\W)", r" \1 ", text, flags=re.ASCII).split())


def answer_texts(record: Mapping[str, Any], name: str = "answers") -> tuple[str, ...]:
    """Return the answers: texts, mappings with a ``text``, or one mapping of columns as the hub has them.

    Raises:
        DataError: There is none, or one is no text.
    """
    answers = field(record, name)
    if isinstance(answers, Mapping):
        answers = field(answers, "text")
    if not isinstance(answers, (list, tuple)) or not answers:
        raise DataError(f"field '{name}' is {answers!r}, expected at least one answer")
    return tuple(text_field(one if isinstance(one, Mapping) else {"text": one}, "text") for one in answers)


def question_example(question: str, context: str, answers: tuple[str, ...], split: str, identity: str) -> Example:
    """Make the example of a question; in training it has one answer, the first."""
    padded = tuple(map(pad_punctuation, answers))
    text = f"question: {pad_punctuation(question)} context: {pad_punctuation(context)}"
    original = {"answers": answers}  # predictions of other systems have no spaces around punctuation
    return Example(text, padded[0], references=() if split == "train" else padded, id=identity, metadata=original)


def _read(record: Mapping[str, Any], split: str) -> list[Example]:
    question, context = text_field(record, "question"), text_field(record, "context")
    return [question_example(question, context, answer_texts(record), split, str(record.get("id", "")))]


SQUAD = register(
    Task(
        name="squad",
        description="questions about a paragraph, answered by a span of it",
        format=TextFormat(_read),
        source=Source(
            local={"train": "qa/squad11/train.jsonl", "dev": "qa/squad11_dev_part/titles_a36.jsonl"},
            hub=hub_splits("rajpurkar/squad", train="train", dev="validation"),
        ),
        metrics=("squad_f1", "squad_em"),
        selection="squad_f1",
        decoding=ANSWER_DECODING,
    )
)
