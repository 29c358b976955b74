"""DialogSum (Chen et al. 2021): an everyday conversation becomes a summary. CC BY-NC-SA 4.0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softprompts.config import DecodingConfig
from softprompts.tasks.formats import TextFormat, text_field, texts_field
from softprompts.tasks.sources import hub_splits
from softprompts.tasks.task import Source, Task, register
from softprompts.types import Example

__all__ = ["DIALOGSUM"]

_FOLDER = "research_only/summ/dialogsum"


def _read(record: Mapping[str, Any], split: str) -> list[Example]:
    """Read a record with ``dialogue, summaries``, or the hub's with one ``summary``."""
    summaries = texts_field(record, "summaries") if "summaries" in record else (text_field(record, "summary"),)
    identity = str(record.get("id", ""))
    return [Example(text_field(record, "dialogue"), summaries[0], references=summaries, id=identity)]


DIALOGSUM = register(
    Task(
        name="dialogsum",
        description="conversations to a summary",
        format=TextFormat(_read, separator="\nSummary:", target_lead=" "),
        source=Source(
            local={split: f"{_FOLDER}/{split}.jsonl" for split in ("train", "dev", "test")},
            hub=hub_splits("knkarthick/dialogsum", train="train", dev="validation", test="test"),
        ),
        metrics=("rouge_score_1", "rouge_score_2", "rouge_score_l"),
        decoding=DecodingConfig(strategy="beam", beams=4, max_new_tokens=100, banned=("\n", "\n\n")),
    )
)
