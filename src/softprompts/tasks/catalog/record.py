"""ReCoRD of SuperGLUE (Zhang et al. 2018): which entity fills the gap of a query about a news passage.

Input as in T5's preprocessor: ``query: ... entities: a, b passage: ...``; the highlights at the end of a passage become
sentences of it. Training has one example per right entity, evaluation one per query. The entities are the choices.
The paper starts its prompt from the words commonsense, reasoning, reading, comprehension, there being no labels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from softprompts.config import DecodingConfig
from softprompts.errors import DataError
from softprompts.tasks.formats import TextFormat, field, text_field, texts_field
from softprompts.tasks.sources import hub_splits
from softprompts.tasks.task import Source, Task, register
from softprompts.types import UNLABELLED, Example

__all__ = ["RECORD"]

_FOLDER = "research_only/superglue/ReCoRD"


def _read(record: Mapping[str, Any], split: str) -> list[Example]:
    """Read one passage of the official JSONL with all its queries, or one query as the hub has it."""
    return [_example(row, split) for row in (_flat(record) if "qas" in record else [record])]


def _flat(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    passage = text_field(record, "passage.text")
    spans = field(record, "passage.entities")
    for query in field(record, "qas"):
        yield {
            "passage": passage,
            "query": field(query, "query"),
            "entities": _unique([passage[span["start"] : span["end"] + 1] for span in spans]),
            "answers": _unique([field(answer, "text") for answer in field(query, "answers")])
            if "answers" in query
            else [],
            "idx": {"passage": field(record, "idx"), "query": field(query, "idx")},
        }


def _unique(texts: Sequence[str]) -> list[str]:
    return sorted(set(texts))


def _example(row: Mapping[str, Any], split: str) -> Example:
    secret = split == "test" and not row.get("answers")
    entities = texts_field(row, "entities")
    answers = (UNLABELLED,) if secret else tuple(_unique(texts_field(row, "answers")))
    unknown = [answer for answer in answers if answer not in entities and not secret]
    if unknown:
        raise DataError(f"the answer {unknown[0]!r} is none of the entities {list(entities)}")
    passage = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", text_field(row, "passage"))
    passage = passage.replace("\n@highlight\n", ". ")
    return Example(
        f"query: {text_field(row, 'query')} entities: {', '.join(entities)} passage: {passage}",
        answers[0],
        references=answers,
        choices=entities,
        id=f"{field(row, 'idx.passage')}-{field(row, 'idx.query')}",
    )


RECORD = register(
    Task(
        name="superglue_record",
        description="the entity that fills a gap",
        format=TextFormat(_read),
        source=Source(
            local={"train": f"{_FOLDER}/train.jsonl", "dev": f"{_FOLDER}/val.jsonl"},
            hub=hub_splits("aps/super_glue", "record", train="train", dev="validation"),
        ),
        metrics=("squad_f1", "squad_em"),
        selection="squad_f1",
        decoding=DecodingConfig(max_new_tokens=32),
        prompt_words=("commonsense", "reasoning", "reading", "comprehension"),
    )
)
