"""Made-up text and a recipe for a model of two layers, in fp32 without compilation."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from softprompts.pretraining.recipe import (
    CorpusConfig,
    LMConfig,
    LMTrainingConfig,
    OutputConfig,
    PretrainRecipe,
    SourceConfig,
    TokenizerConfig,
)

_TOWNS = ("Paris", "London", "Rome", "Oslo", "Lima")
_DISHES = ("soup", "noodles", "curry", "bread", "salad", "pancakes")


def corpus_text(seed: int) -> str:
    """A few lines of simple, made-up English."""
    rng = random.Random(seed)
    lines = []
    for _ in range(rng.randint(3, 8)):
        town, dish, hour = rng.choice(_TOWNS), rng.choice(_DISHES), rng.randint(1, 12)
        lines.append(f"The kitchen in {town} serves fresh {dish} at {hour} pm for Maria Lopez.")
    return "\n".join(lines)


def quiet(line: str) -> None:
    """Report to nobody."""


def losses(history: Iterable[Mapping[str, Any]]) -> list[float]:
    """The loss of every step of a run."""
    return [event["loss"] for event in history if "loss" in event]


def make_recipe(corpus_dir: Path, output_dir: Path, **training: object) -> PretrainRecipe:
    """A recipe that trains in a second; keywords change its section ``training``."""
    settings = {
        "total_tokens": 12 * 4 * 32,
        "batch_rows": 4,
        "schedule": "wsd",
        "warmup_steps": 3,
        "decay_fraction": 0.25,
        "precision": "fp32",
        "compile": False,
        "device": "cpu",
    }
    return PretrainRecipe(
        name="test-lm",
        corpus=CorpusConfig(
            sources=(
                SourceConfig("talk", ("talk.jsonl.gz",), 3.0, license="CC0"),
                SourceConfig("book", ("book.txt",), 1.0, unwrap=True),
                SourceConfig("records", ("talk.jsonl.gz",), 2.0, objective="records"),
            ),
            data_dir=str(corpus_dir),
            tokens=20_000,
            max_characters=300,
            held_out_permille=100,
            held_out_tokens=2_000,
        ),
        tokenizer=TokenizerConfig(vocab_size=400, training_characters=50_000),
        model=LMConfig(width=32, layers=2, heads=2, mlp_width=48, context=32),
        training=LMTrainingConfig(**(settings | training)),  # type: ignore[arg-type]
        output=OutputConfig(output_dir=str(output_dir), checkpoint_every_s=1e9, export_every_s=1e9, log_every_steps=1),
    )


def with_training(recipe: PretrainRecipe, **changes: Any) -> PretrainRecipe:
    """The recipe with other values in its section ``training``."""
    return dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, **changes))
