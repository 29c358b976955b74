"""DART v1.1.1 (Nan et al. 2021): a set of triples from tables becomes a text. MIT.

Format as in the prefix-tuning paper's official code: ``subject : relation : object`` with the relation in lower case,
joined with `` | ``. Evaluation compares with all annotations of a set of triples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softprompts.config import DecodingConfig
from softprompts.errors import DataError
from softprompts.tasks.formats import END_TOKEN, TextFormat, field, text_field, texts_field
from softprompts.tasks.sources import hub_splits
from softprompts.tasks.task import Source, Task, register
from softprompts.types import Example

__all__ = ["DART"]


def _read(record: Mapping[str, Any], split: str) -> list[Example]:
    """Read a record whose annotations are a list of ``source, text``, or the hub's table of the same columns."""
    triples, annotations = field(record, "tripleset"), field(record, "annotations")
    if not triples or not all(len(triple) == 3 for triple in triples):
        raise DataError(f"field 'tripleset' is {triples!r}, expected at least one of subject, relation and object")
    if isinstance(annotations, Mapping):
        texts = texts_field(record, "annotations.text")
    else:
        texts = tuple(text_field(annotation, "text") for annotation in annotations)
    if not texts:
        raise DataError("field 'annotations' is empty, expected at least one text")
    source = " | ".join(f"{subject} : {relation.lower()} : {other}" for subject, relation, other in triples)
    return [Example(source, texts[0], references=texts, id=str(record.get("id", "")))]


DART = register(
    Task(
        name="dart",
        description="triples from tables to text",
        format=TextFormat(_read, separator=END_TOKEN, input_lead=" ", target_lead=" "),
        source=Source(
            local={split: f"dart/{split}.jsonl" for split in ("train", "dev", "test")},
            hub=hub_splits("Yale-LILY/dart", train="train", dev="validation", test="test"),
        ),
        metrics=("multi_bleu", "ter"),
        decoding=DecodingConfig(strategy="beam", beams=5, min_new_tokens=5, max_new_tokens=100, banned=("\n", "\n\n")),
    )
)
