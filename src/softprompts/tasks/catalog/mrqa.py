"""The six out-of-domain sets of the MRQA 2019 shared task (Fisch et al. 2019), judged by a prompt trained on SQuAD.

Read in MRQA's own format, JSON lines with a header line first and one passage with its questions in each of the rest
(``task.dev=BioASQ.jsonl.gz``), as the hub's copy has them, and with SQuAD's fields. Texts as in ``squad``.
``--set task.setting.judge_task=mrqa_bioasq`` on the task ``squad`` is the prompt-tuning paper's domain shift.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from softprompts.tasks.catalog.squad import ANSWER_DECODING, answer_texts, question_example
from softprompts.tasks.formats import TextFormat, field, text_field
from softprompts.tasks.sources import hub_splits
from softprompts.tasks.task import Source, Task, register
from softprompts.types import Example

__all__ = ["MRQA"]


def _reader(subset: str) -> Callable[[Mapping[str, Any], str], list[Example]]:
    def read(record: Mapping[str, Any], split: str) -> list[Example]:
        if "header" in record:
            return []
        if str(record.get("subset", subset)).split(".")[0] != subset:  # the hub has all six in one split
            return []
        context = text_field(record, "context")
        rows = field(record, "qas") if "qas" in record else [record]
        return [
            question_example(
                text_field(row, "question"), context, answer_texts(row), split, str(row.get("qid", row.get("id", "")))
            )
            for row in rows
        ]

    return read


def _register(name: str, subset: str, file: str, description: str, local: Mapping[str, str] | None = None) -> Task:
    return register(
        Task(
            name=f"mrqa_{name}",
            description=description,
            format=TextFormat(_reader(subset)),
            source=Source(
                local=local or {"dev": f"qa/mrqa/{file}.jsonl.gz"}, hub=hub_splits("mrqa-workshop/mrqa", dev="test")
            ),
            metrics=("squad_f1", "squad_em"),
            selection="squad_f1",
            decoding=ANSWER_DECODING,
        )
    )


_RACE = "research_only/qa/ood_race"
MRQA = (
    _register("textbookqa", "TextbookQA", "TextbookQA", "questions about school science"),
    _register("bioasq", "BioASQ", "BioASQ", "questions about biomedical abstracts"),
    _register(
        "race",
        "RACE",
        "RACE",
        "questions of English examinations",
        {"train": f"{_RACE}/train.jsonl", "dev": f"{_RACE}/val.jsonl"},
    ),
    _register("relationextraction", "RelationExtraction", "RelationExtraction", "relations asked for as questions"),
    _register("duorc", "DuoRC", "DuoRC.ParaphraseRC", "questions about films, asked from another telling"),
    _register("drop", "DROP", "DROP", "questions that need some arithmetic, answered by a span"),
)
"""TextbookQA, BioASQ, RACE, RelationExtraction, DuoRC, DROP."""
