"""AG News headlines (Zhang et al. 2015): the text of a news item becomes its headline; by topic.

``task.setting.name=new_topic`` trains on world and business news and judges on the other topics. Files of the data
folder have ``document, summary, topic``, the hub's copy ``description, title, label``. They are in one or two pieces,
so splits are cut from them, always alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softprompts.config import DecodingConfig, SettingConfig
from softprompts.tasks.formats import TextFormat, text_field
from softprompts.tasks.labels import Verbalizer
from softprompts.tasks.settings import CATEGORY
from softprompts.tasks.sources import hub_splits
from softprompts.tasks.task import SPLITS, Source, Task, register
from softprompts.types import Example

__all__ = ["AGNEWS"]

_TOPICS = ("World", "Sports", "Business", "Sci/Tech")
_LABELS = Verbalizer(_TOPICS, names=("1", "2", "3", "4"))


def _read(record: Mapping[str, Any], split: str) -> list[Example]:
    if "description" in record:
        text, headline = text_field(record, "description"), text_field(record, "title")
        topic = _LABELS.word(record)
    else:
        text, headline = text_field(record, "document"), text_field(record, "summary")
        topic = text_field(record, "topic")
    return [Example(text, headline, id=str(record.get("id", "")), metadata={CATEGORY: topic})]


AGNEWS = register(
    Task(
        name="agnews",
        description="news items to headlines; setting new_topic",
        format=TextFormat(_read, separator="\nHeadline:", target_lead=" "),
        source=Source(
            local=dict.fromkeys(SPLITS, "research_only/summ/agnews_headline/news.jsonl"),
            hub=hub_splits("sh0416/ag_news", train="train", dev="train", test="test"),
            shares={"train": 0.8, "dev": 0.1, "test": 0.1},
        ),
        metrics=("rouge_score_1", "rouge_score_2", "rouge_score_l"),
        decoding=DecodingConfig(strategy="beam", beams=4, max_new_tokens=40, banned=("\n", "\n\n")),
        settings={"new_topic": SettingConfig(train_on=("World", "Business"))},
    )
)
