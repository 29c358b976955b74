"""A tiny model and a few records, for everything that the baselines do from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from softprompts.cli.main import main
from softprompts.config import TrainRecipe
from tiny_world import changed_recipe, model_section, save_model, write_records

REVIEWS = {
    "fine film": "good", "bad plot": "poor", "so good": "good", "so dull": "poor",
    "nice cast": "good", "no story": "poor", "great": "good", "weak": "poor",
}  # fmt: skip


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A directory with a model and two splits of records."""
    root = tmp_path_factory.mktemp("baselines")
    save_model(root, tokenizer)
    records = [{"text": text, "label": label} for text, label in REVIEWS.items()]
    write_records(root / "train.jsonl", records[:6])
    write_records(root / "dev.jsonl", records[4:])
    return root


@pytest.fixture
def recipe(world: Path, tmp_path: Path) -> Callable[..., TrainRecipe]:
    """``recipe(section={...})``: a recipe for the tiny world, with some values changed."""

    def make(**changes: Any) -> TrainRecipe:
        settings: dict[str, Any] = {
            "model": model_section(world),
            "task": {
                "name": "records",
                "train": str(world / "train.jsonl"),
                "dev": str(world / "dev.jsonl"),
                "format": "It is {text}. So:",
                "target": "{label:good=good|poor=poor}",
            },
            "prompt": {"kind": "embedding", "length": 3, "initializer": {"name": "text", "text": "the"}},
            "optimizer": {"learning_rate": 0.01},
            "training": {"max_steps": 4, "batch_size": 2, "validate_every_steps": 2, "checkpoint_every_steps": 2},
            "evaluation": {"prediction": "rank", "decoding": {"max_new_tokens": 4}},
            "output_dir": str(tmp_path / "run"),
        }
        return changed_recipe(settings, changes)

    return make


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``command(*words)`` runs softprompts and returns what it wrote to standard output."""

    def run(*words: object, code: int = 0) -> str:
        with pytest.raises(SystemExit) as exit_:
            main([str(word) for word in words])
        said = capsys.readouterr()
        assert (exit_.value.code or 0) == code, said.err
        return said.out if code == 0 else said.err

    return run
