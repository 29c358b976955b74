"""SciTLDR (Cachola et al. 2020): the abstract of a paper becomes one sentence. Apache-2.0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softprompts.config import DecodingConfig
from softprompts.tasks.formats import TextFormat, texts_field
from softprompts.tasks.sources import hub_splits
from softprompts.tasks.task import Source, Task, register
from softprompts.types import Example

__all__ = ["SCITLDR"]


def _read(record: Mapping[str, Any], split: str) -> list[Example]:
    summaries = texts_field(record, "target")
    identity = str(record.get("id") or record.get("paper_id") or "")
    return [Example(" ".join(texts_field(record, "source")), summaries[0], references=summaries, id=identity)]


SCITLDR = register(
    Task(
        name="scitldr",
        description="abstracts of papers to one sentence",
        format=TextFormat(_read, separator="\nSummary:", target_lead=" "),
        source=Source(
            local={split: f"summ/scitldr_a/{split}.jsonl" for split in ("train", "dev", "test")},
            hub=hub_splits("allenai/scitldr", "Abstract", train="train", dev="validation", test="test"),
        ),
        metrics=("rouge_score_1", "rouge_score_2", "rouge_score_l"),
        decoding=DecodingConfig(strategy="beam", beams=4, max_new_tokens=80, banned=("\n", "\n\n")),
    )
)
