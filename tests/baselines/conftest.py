"""A tiny model and a few records, for everything that the baselines do from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from conftest import tiny_model
from softprompts.cli.main import main
from softprompts.config import TrainRecipe, decode

REVIEWS = {
    "fine film": "good", "bad plot": "poor", "so good": "good", "so dull": "poor",
    "nice cast": "good", "no story": "poor", "great": "good", "weak": "poor",
}  # fmt: skip


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A directory with a model and two splits of records."""
    root = tmp_path_factory.mktemp("baselines")
    tiny_model("gpt2").save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    lines = [json.dumps({"text": text, "label": label}) for text, label in REVIEWS.items()]
    (root / "train.jsonl").write_text("\n".join(lines[:6]))
    (root / "dev.jsonl").write_text("\n".join(lines[4:]))
    return root


@pytest.fixture
def recipe(world: Path, tmp_path: Path) -> Callable[..., TrainRecipe]:
    """``recipe(section={...})``: a recipe for the tiny world, with some values changed."""

    def make(**changes: Any) -> TrainRecipe:
        settings: dict[str, Any] = {
            "model": {"name_or_path": str(world / "model"), "device": "cpu"},
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
        for section, values in changes.items():
            settings[section] = {**settings.get(section, {}), **values} if isinstance(values, Mapping) else values
        return decode(TrainRecipe, settings)

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
