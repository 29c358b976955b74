"""An infix from recipe to output: trained with and without kept inputs, saved, evaluated, used."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from softprompts.cli.main import main
from softprompts.cli.train import run_recipe
from softprompts.config import TrainRecipe, decode
from softprompts.errors import ConfigError
from softprompts.storage import read_info
from tiny_world import animal_task, animal_world, model_section


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> TrainRecipe:
    animal_world(tmp_path, tokenizer, "llama")
    return decode(
        TrainRecipe,
        {
            "model": model_section(tmp_path),
            "task": {**animal_task(tmp_path), "dev": str(tmp_path / "train.jsonl")},
            "prompt": {"length": 3, "placement": "infix", "initializer": {"name": "text", "text": "sounds"}},
            "training": {"max_steps": 4, "batch_size": 2, "validate_every_steps": 2},
            "evaluation": {"selection": "exact_match", "decoding": {"max_new_tokens": 3}},
            "output_dir": str(tmp_path / "run"),
        },
    )


@pytest.mark.parametrize("kind", ["prefix", "embedding"])
def test_kept_inputs_give_the_same_run(
    recipe: TrainRecipe, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = dataclasses.replace(recipe, prompt=dataclasses.replace(recipe.prompt, kind=kind))
    plain = run_recipe(recipe)
    model = dataclasses.replace(recipe.model, cache_source_gib=4.0)
    kept = run_recipe(dataclasses.replace(recipe, model=model, output_dir=str(tmp_path / "kept")))
    assert kept["metrics"]["loss"] == pytest.approx(plain["metrics"]["loss"], rel=1e-5)
    info = read_info(tmp_path / "kept" / "prompt")
    assert (info.kind, info.placement) == (kind, "infix")
    lines = tmp_path / "lines.txt"
    lines.write_text("The cat says\n")
    saved = ["--prompt", str(tmp_path / "kept" / "prompt")]
    with pytest.raises(SystemExit) as done:
        main(["generate", str(lines), *saved])
    assert not done.value.code
    assert len(capsys.readouterr().out.split("\n")) == 2
    with pytest.raises(SystemExit) as refused:
        main(["generate", str(lines), *saved, "--raw"])
    assert refused.value.code
    assert "where its input ends" in capsys.readouterr().err


def test_what_cannot_be_kept_is_refused_at_the_start(recipe: TrainRecipe) -> None:
    model = dataclasses.replace(recipe.model, cache_source_gib=4.0)
    in_front = dataclasses.replace(recipe.prompt, placement="prefix")
    with pytest.raises(ConfigError, match="placement infix"):
        run_recipe(dataclasses.replace(recipe, model=model, prompt=in_front))
    small = dataclasses.replace(model, cache_source_gib=1e-6)
    with pytest.raises(ConfigError, match="cache_source_gib"):
        run_recipe(dataclasses.replace(recipe, model=small, output_dir=f"{recipe.output_dir}-small"))
