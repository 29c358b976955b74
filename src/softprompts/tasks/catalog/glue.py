"""GLUE (Wang et al. 2018): sentiment, paraphrases, acceptability. Inputs and label words as in T5's preprocessors.

QQP and MRPC are the prompt-tuning paper's domain shift: train on one, judge on the other
(``task.setting.judge_task=glue_mrpc``); the label words are then those that were trained on.
"""

from __future__ import annotations

from softprompts.tasks.labels import LABEL_DECODING, Verbalizer, keyed_format
from softprompts.tasks.sources import hub_splits
from softprompts.tasks.task import Source, Task, register

__all__ = ["COLA", "MRPC", "QQP", "SST2"]

_FOLDER = "research_only/glue"


def _register(
    name: str,
    description: str,
    keys: tuple[str, ...],
    words: tuple[str, ...],
    *,
    folder: str,
    names: tuple[str, ...] = (),
    metrics: tuple[str, ...] = ("accuracy",),
    splits: tuple[str, ...] = ("train", "dev"),
) -> Task:
    theirs = {"train": "train", "dev": "validation", "test": "test"}
    return register(
        Task(
            name=f"glue_{name}",
            description=description,
            format=keyed_format(keys, Verbalizer(words, names)),
            source=Source(
                local={split: f"{_FOLDER}/{folder}/{split}.jsonl" for split in splits},
                hub=hub_splits("nyu-mll/glue", name, **{split: theirs[split] for split in splits}),
            ),
            metrics=metrics,
            selection=metrics[0],
            decoding=LABEL_DECODING,
            choices=words,
        )
    )


SST2 = _register("sst2", "sentiment of a sentence", ("sentence",), ("negative", "positive"), folder="SST-2")
MRPC = _register(
    "mrpc",
    "whether two sentences say the same",
    ("sentence1", "sentence2"),
    ("not_equivalent", "equivalent"),
    folder="MRPC",
    metrics=("accuracy", "f1"),
    splits=("train", "dev", "test"),
)
QQP = _register(
    "qqp",
    "whether two questions ask the same",
    ("question1", "question2"),
    ("not_duplicate", "duplicate"),
    folder="QQP",
    metrics=("accuracy", "f1"),
)
COLA = _register(
    "cola",
    "whether a sentence is grammatical",
    ("sentence",),
    ("unacceptable", "acceptable"),
    folder="CoLA",
    metrics=("matthews", "accuracy"),
)
