"""What the verbs are run on in tests: a model of three layers in a folder, and a few records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from conftest import tiny_model
from softprompts.config import TrainRecipe, decode

ANIMALS = {"cat": "meow", "dog": "woof", "cow": "moo", "owl": "hoot", "pig": "oink", "hen": "cluck"}


def save_model(root: Path, tokenizer: PreTrainedTokenizerBase, family: str = "gpt2") -> Path:
    """Save a tiny model with its tokenizer in ``root/model``."""
    tiny_model(family).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    return root / "model"


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Write records as JSON Lines."""
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def animal_world(root: Path, tokenizer: PreTrainedTokenizerBase, family: str = "gpt2") -> Path:
    """Fill a folder with a model, four records to train on and four for dev, of which two are the same."""
    save_model(root, tokenizer, family)
    records = [{"animal": animal, "sound": sound} for animal, sound in ANIMALS.items()]
    write_records(root / "train.jsonl", records[:4])
    write_records(root / "dev.jsonl", records[2:])
    return root


def model_section(root: Path) -> dict[str, Any]:
    """Section ``model`` of a recipe for the model in ``root``."""
    return {"name_or_path": str(root / "model"), "device": "cpu"}


def animal_task(root: Path) -> dict[str, Any]:
    """Section ``task`` of a recipe for the records in ``root``."""
    return {
        "name": "records",
        "train": str(root / "train.jsonl"),
        "dev": str(root / "dev.jsonl"),
        "format": "The {animal} says",
        "target": "{sound}",
    }


def changed_recipe(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> TrainRecipe:
    """Make a recipe of some settings; a section of ``changes`` replaces those of its keys that it names."""
    sections = dict(settings)
    for name, values in changes.items():
        sections[name] = {**sections.get(name, {}), **values} if isinstance(values, Mapping) else values
    return decode(TrainRecipe, sections)
