"""Gazette, the quickstart task: a record of two to six slots becomes a short notice. Made for this project.

Five domains (boats, museums, recipes, concerts, trains), 2,000 / 200 / 200 records, two to four references each outside
training. The data come with the package and are written by ``scripts/make_gazette.py``: names, and pairs
of the two leading slots, of dev and test never occur in train, so a prompt has to learn the notices' style and to copy.
"""

from __future__ import annotations

from pathlib import Path

from softprompts.config import DecodingConfig
from softprompts.tasks.formats import template_format
from softprompts.tasks.task import SPLITS, Source, Task, register

__all__ = ["GAZETTE"]

_DATA = Path(__file__).parent / "data"

GAZETTE = register(
    Task(
        name="gazette",
        description="short notices about boats, museums, recipes, concerts and trains; needs no download",
        format=template_format("{input}", "{references}"),
        source=Source(packaged={split: str(_DATA / f"gazette.{split}.jsonl.gz") for split in SPLITS}),
        metrics=("bleu", "rouge_score_l", "exact_match"),
        selection="loss",
        decoding=DecodingConfig(strategy="greedy", max_new_tokens=64),
    )
)
