"""Subj (Pang & Lee 2004): whether a sentence about a film states an opinion. The splits are cut from one file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softprompts.tasks.formats import TextFormat, text_field
from softprompts.tasks.labels import LABEL_DECODING, Verbalizer
from softprompts.tasks.sources import hub_splits
from softprompts.tasks.task import SPLITS, Source, Task, register
from softprompts.types import Example

__all__ = ["SUBJ"]

_LABELS = Verbalizer(("objective", "subjective"))


def _read(record: Mapping[str, Any], split: str) -> list[Example]:
    """Read a record with ``text, label``; the hub's has the label's name in ``label_text``."""
    label = "label_text" if "label_text" in record else "label"
    return [Example(f"sentence: {text_field(record, 'text').strip()}", _LABELS.word(record, label))]


SUBJ = register(
    Task(
        name="subj",
        description="whether a sentence states an opinion",
        format=TextFormat(_read, separator="\nkind:", target_lead=" "),
        source=Source(
            local=dict.fromkeys(SPLITS, "research_only/cls/Subj/all.jsonl"),
            hub=hub_splits("SetFit/subj", train="train", dev="train", test="test"),
            shares={"train": 0.8, "dev": 0.1, "test": 0.1},
        ),
        metrics=("accuracy",),
        selection="accuracy",
        decoding=LABEL_DECODING,
        choices=_LABELS.words,
    )
)
