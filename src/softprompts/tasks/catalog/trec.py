"""TREC questions (Li & Roth 2002): what kind of thing a question asks for.

The data set has no dev split: it is cut from the training file, a tenth of it, always alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softprompts.tasks.formats import TextFormat, text_field
from softprompts.tasks.labels import LABEL_DECODING, Verbalizer
from softprompts.tasks.sources import hub_splits
from softprompts.tasks.task import Source, Task, register
from softprompts.types import Example

__all__ = ["TREC"]

_LABELS = Verbalizer(
    ("abbreviation", "entity", "description", "human", "location", "number"),
    names=("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"),
)
_FOLDER = "research_only/cls/TREC"


def _read(record: Mapping[str, Any], split: str) -> list[Example]:
    """Read a record with ``text, label``, or the hub's with ``coarse_label``."""
    label = "coarse_label" if "coarse_label" in record else "label"
    return [Example(f"question: {text_field(record, 'text')}", _LABELS.word(record, label))]


TREC = register(
    Task(
        name="trec",
        description="what kind of thing a question asks for",
        format=TextFormat(_read, separator="\nkind:", target_lead=" "),
        source=Source(
            local={
                "train": f"{_FOLDER}/train.jsonl",
                "dev": f"{_FOLDER}/train.jsonl",
                "test": f"{_FOLDER}/test.jsonl",
            },
            hub=hub_splits("CogComp/trec", train="train", dev="train", test="test"),
            shares={"train": 0.9, "dev": 0.1},
        ),
        metrics=("accuracy",),
        selection="accuracy",
        decoding=LABEL_DECODING,
        choices=_LABELS.words,
    )
)
