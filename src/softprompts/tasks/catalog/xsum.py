"""XSUM (Narayan et al. 2018): a news article becomes one sentence.

The settings ``news_to_sports`` and ``within_news`` are the prefix-tuning paper's: train on news, judge on sports; train
on world, UK and business news, judge on the rest of the news. They need each article's section, a field ``category``
(``news/health``, ``sport/tennis``) or the article's address in ``url``, which the hub's copy leaves out.
Decoding as the paper's BART: six beams, length normalisation 0.8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from softprompts.config import DecodingConfig, SettingConfig
from softprompts.tasks.formats import END_TOKEN, TextFormat, text_field
from softprompts.tasks.settings import CATEGORY
from softprompts.tasks.sources import hub_splits
from softprompts.tasks.task import Source, Task, register
from softprompts.types import Example

__all__ = ["XSUM", "section_of"]

_ADDRESS = re.compile(r"bbc\.(?:co\.uk|com)/(\w+)/(?:\d+/)?([a-z][a-z-]*)?")


def section_of(url: str) -> str | None:
    """Return the section that an address names: ``.../news/world-europe-123`` is ``news/world-europe``."""
    match = _ADDRESS.search(url)
    return f"{match[1]}/{(match[2] or '').rstrip('-')}" if match else None


def _read(record: Mapping[str, Any], split: str) -> list[Example]:
    category = record.get(CATEGORY) or section_of(str(record.get("url", "")))
    return [
        Example(
            text_field(record, "document"),
            text_field(record, "summary"),
            id=str(record.get("id", "")),
            metadata={CATEGORY: category} if category else {},
        )
    ]


XSUM = register(
    Task(
        name="xsum",
        description="news articles to one sentence; settings news_to_sports and within_news",
        format=TextFormat(_read, separator=END_TOKEN, input_lead=" ", target_lead=" "),
        source=Source(
            local={split: f"research_only/xsum/{split}.jsonl" for split in ("train", "dev", "test")},
            hub=hub_splits("EdinburghNLP/xsum", train="train", dev="validation", test="test"),
        ),
        metrics=("rouge_score_1_stem", "rouge_score_2_stem", "rouge_score_l_stem"),
        decoding=DecodingConfig(
            strategy="beam", beams=6, length_penalty=0.8, min_new_tokens=11, max_new_tokens=62, banned=("\n", "\n\n")
        ),
        settings={
            "news_to_sports": SettingConfig(train_on=("news/*",), judge_on=("sport/*",)),
            "within_news": SettingConfig(train_on=("news/world*", "news/uk*", "news/business*"), judge_on=("news/*",)),
        },
    )
)
