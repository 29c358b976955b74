"""SuperGLUE (Wang et al. 2019): the five tasks whose answer is a label. MultiRC, ReCoRD and WSC have own files.

Inputs and label words as in T5's preprocessors, without the task's name, as the prompt-tuning paper has them.
"""

from __future__ import annotations

from softprompts.tasks.labels import LABEL_DECODING, Verbalizer, keyed_format
from softprompts.tasks.sources import hub_splits
from softprompts.tasks.task import Source, Task, register

__all__ = ["BOOLQ", "CB", "COPA", "RTE", "WIC"]

_RESEARCH = "research_only/superglue"
_TRUTH = ("False", "True")


def _register(
    name: str,
    description: str,
    keys: tuple[str, ...],
    words: tuple[str, ...],
    folder: str,
    metrics: tuple[str, ...] = ("accuracy",),
    tail: str | None = None,
) -> Task:
    return register(
        Task(
            name=f"superglue_{name}",
            description=description,
            format=keyed_format(keys, Verbalizer(words), tail),
            source=Source(
                local={"train": f"{folder}/train.jsonl", "dev": f"{folder}/val.jsonl"},
                hub=hub_splits("aps/super_glue", name, train="train", dev="validation"),
            ),
            metrics=metrics,
            selection=metrics[0],
            decoding=LABEL_DECODING,
            choices=words,
        )
    )


BOOLQ = _register(
    "boolq",
    "yes-or-no questions about a passage",
    ("passage", "question"),
    _TRUTH,
    "superglue/BoolQ",
    tail="question",
)
CB = _register(
    "cb",
    "whether a text commits its speaker to a hypothesis",
    ("hypothesis", "premise"),
    ("entailment", "contradiction", "neutral"),
    f"{_RESEARCH}/CB",
    ("accuracy", "macro_f1"),
)
COPA = _register(
    "copa",
    "the likelier cause or effect",
    ("choice1", "choice2", "premise", "question"),
    ("choice1", "choice2"),
    f"{_RESEARCH}/COPA",
)
RTE = _register(
    "rte",
    "whether a text entails a hypothesis",
    ("hypothesis", "premise"),
    ("entailment", "not_entailment"),
    f"{_RESEARCH}/RTE",
)
WIC = _register(
    "wic",
    "whether a word means the same in two sentences",
    ("sentence1", "sentence2", "word"),
    _TRUTH,
    f"{_RESEARCH}/WiC",
)
