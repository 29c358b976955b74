"""WebNLG 2017 (Gardent et al. 2017): one to seven triples become a text. CC BY-NC-SA 4.0.

Format as in the prefix-tuning paper's official code (Li & Liang 2021): every triple, the first as well, begins with
`` | ``, then ``subject : property : object``. Training takes the texts with the comment ``good`` (18,025 of 18,102);
evaluation takes all. (The official reader leaves the first `` | `` out of the very first test entry; this does not.)
The test split has ten categories that are trained on and five that are not: ``task.setting.name`` is ``seen``,
``unseen``, or nothing for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softprompts.config import DecodingConfig, SettingConfig
from softprompts.errors import DataError
from softprompts.tasks.formats import END_TOKEN, TextFormat, field, text_field, texts_field
from softprompts.tasks.settings import CATEGORY
from softprompts.tasks.sources import hub_splits
from softprompts.tasks.task import Source, Task, register
from softprompts.types import Example

__all__ = ["WEBNLG"]

_SEEN = (
    "Airport",
    "Astronaut",
    "Building",
    "City",
    "ComicsCharacter",
    "Food",
    "Monument",
    "SportsTeam",
    "University",
    "WrittenWork",
)
_UNSEEN = ("Artist", "Athlete", "CelestialBody", "MeanOfTransportation", "Politician")
_FOLDER = "research_only/webnlg2017"


def _read(record: Mapping[str, Any], split: str) -> list[Example]:
    """Read a record with ``triples, references, reference_comments``, or the hub's: ``modified_triple_sets, lex``."""
    if "lex" in record:
        (*_, written) = field(record, "modified_triple_sets.mtriple_set")
        triples = [text.split(" | ") for text in written]
        texts, comments = texts_field(record, "lex.text"), field(record, "lex.comment")
    else:
        triples = field(record, "triples")
        texts, comments = texts_field(record, "references"), field(record, "reference_comments")
    if not triples or not all(len(triple) == 3 for triple in triples):
        raise DataError(f"the triples are {triples!r}, expected at least one of subject, property and object")
    if split == "train":
        texts = tuple(text for text, comment in zip(texts, comments, strict=True) if comment == "good")
    if not texts:
        return []
    source = "".join(f" | {' : '.join(triple)}" for triple in triples)
    category = {CATEGORY: text_field(record, "category")}
    return [Example(source, texts[0], references=texts, id=str(record.get("id", "")), metadata=category)]


WEBNLG = register(
    Task(
        name="webnlg",
        description="triples to text; settings seen and unseen",
        format=TextFormat(_read, separator=END_TOKEN, input_lead=" ", target_lead=" "),
        source=Source(
            local={split: f"{_FOLDER}/{split}.jsonl" for split in ("train", "dev", "test")},
            hub=hub_splits("webnlg-challenge/web_nlg", "webnlg_challenge_2017", train="train", dev="dev", test="test"),
        ),
        metrics=("webnlg_bleu", "webnlg_ter"),
        decoding=DecodingConfig(strategy="beam", beams=5, min_new_tokens=5, max_new_tokens=100, banned=("\n", "\n\n")),
        settings={"seen": SettingConfig(judge_on=_SEEN), "unseen": SettingConfig(train_on=_SEEN, judge_on=_UNSEEN)},
    )
)
