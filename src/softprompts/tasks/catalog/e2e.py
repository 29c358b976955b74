"""E2E NLG (Novikova et al. 2017): a restaurant's attributes become a sentence or two. CC BY-SA 4.0.

Format as in the prefix-tuning paper's official code (Li & Liang 2021): ``name : Blue Spice | Type : coffee shop``, the
end-of-sequence token as separator, one training row per (meaning, reference); evaluation is per distinct meaning with
all references. Texts are the data set's own (the official code's copies have spaces around punctuation); runs of
blanks in a reference are made one. Decoding as there: beam 5, at least five tokens, no newline.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from softprompts.config import DecodingConfig
from softprompts.errors import DataError
from softprompts.tasks.formats import END_TOKEN, TextFormat, field, text_field
from softprompts.tasks.task import Source, Task, register
from softprompts.types import Example

__all__ = ["E2E", "linearize"]

_KEYS = {
    "eatType": "Type",
    "priceRange": "price",
    "customer rating": "customer rating",
    "customerrating": "customer rating",
    "familyFriendly": "family friendly",
    "name": "name",
    "near": "near",
    "food": "food",
    "area": "area",
}
_SLOT = re.compile(r"\s*([^\[\],]+)\[([^\]]*)\]\s*(?:,|$)")
_HUB = "datasets:tuetschek/e2e_nlg?revision=refs/convert/parquet&split="


def linearize(meaning: str) -> str:
    """Turn ``name[Blue Spice], eatType[coffee shop]`` into ``name : Blue Spice | Type : coffee shop``.

    Raises:
        DataError: ``meaning`` is no list of ``key[value]`` with known keys.
    """
    slots, end = [], 0
    for match in _SLOT.finditer(meaning):
        if match.start() != end or match[1] not in _KEYS:
            break
        slots.append(f"{_KEYS[match[1]]} : {match[2]}")
        end = match.end()
    if not slots or end != len(meaning):
        raise DataError(f"the meaning {meaning!r} is no list of key[value] with the keys {', '.join(_KEYS)}")
    return " | ".join(slots)


def _read(record: Mapping[str, Any], split: str) -> list[Example]:
    """Read a record with ``mr, references``, or the hub's: ``meaning_representation, human_reference``."""
    references: Any
    if "meaning_representation" in record:
        meaning, references = text_field(record, "meaning_representation"), [text_field(record, "human_reference")]
    else:
        meaning, references = text_field(record, "mr"), field(record, "references")
    if not isinstance(references, list) or not references or not all(isinstance(text, str) for text in references):
        raise DataError(f"field 'references' is {references!r}, expected a list of at least one text")
    clean = tuple(" ".join(text.split()) for text in references)
    return [Example(linearize(meaning), clean[0], references=clean, id=str(record.get("id", "")))]


E2E = register(
    Task(
        name="e2e",
        description="restaurant attributes to text",
        format=TextFormat(_read, separator=END_TOKEN, input_lead=" ", target_lead=" "),
        source=Source(
            local={"train": "e2e/train.jsonl", "dev": "e2e/dev.jsonl", "test": "e2e/test.jsonl"},
            hub={"train": f"{_HUB}train", "dev": f"{_HUB}validation", "test": f"{_HUB}test"},
        ),
        metrics=("e2e_bleu", "nist", "rouge_score_l"),
        selection="loss",
        decoding=DecodingConfig(strategy="beam", beams=5, min_new_tokens=5, max_new_tokens=100, banned=("\n", "\n\n")),
        merge_inputs=True,
    )
)
