"""`softprompts train`, whole: a tiny model, a few records, and everything a user does with a run."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from softprompts.cli.main import main
from softprompts.cli.train import run_recipe
from softprompts.config import TrainRecipe, decode
from softprompts.errors import CheckpointError, ConfigError, LengthError, StorageError, TrainingInterrupted
from softprompts.folder_lock import alone_in
from softprompts.models import FrozenLM
from softprompts.storage import load_prompt
from tiny_world import animal_task, animal_world, changed_recipe, model_section
from training.toy import timeless


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A directory with a model and two splits of records."""
    return animal_world(tmp_path_factory.mktemp("world"), tokenizer)


@pytest.fixture
def recipe(world: Path, tmp_path: Path) -> Callable[..., TrainRecipe]:
    """``recipe(section={...})``: a recipe for the tiny world, with some values changed."""

    def make(**changes: Any) -> TrainRecipe:
        settings: dict[str, Any] = {
            "model": model_section(world),
            "task": animal_task(world),
            "prompt": {"kind": "prefix", "length": 3, "initializer": {"name": "text", "text": "sounds"}},
            "optimizer": {"learning_rate": 0.02},
            "training": {"max_steps": 6, "batch_size": 2, "validate_every_steps": 2, "checkpoint_every_steps": 2},
            "evaluation": {"decoding": {"max_new_tokens": 4}},
            "output_dir": str(tmp_path / "run"),
        }
        return changed_recipe(settings, changes)

    return make


@pytest.mark.parametrize("selection", ["loss", "exact_match"])
def test_a_prompt_is_trained_chosen_on_dev_and_saved(
    recipe: Callable[..., TrainRecipe], world: Path, tmp_path: Path, selection: str
):
    config = recipe(evaluation={"selection": selection, "decoding": {"max_new_tokens": 4}})
    result = run_recipe(config)
    assert set(result["metrics"]) == {"loss", selection}
    assert (result["steps"], result["reason"], result["trained_parameters"]) == (6, "max_steps", 3 * 3 * 2 * 32)
    validations = [event for event in timeless(tmp_path / "run") if event["event"] == "validation"]
    pick = min if selection == "loss" else max
    best = pick(event["metrics"][selection] for event in validations)
    assert result["metrics"][selection] == best
    if selection == "loss":
        assert result["metrics"]["loss"] < result["reference_loss"]
    loaded = load_prompt(tmp_path / "run" / "prompt", FrozenLM.load(world / "model", device="cpu"))
    assert loaded.prompt.length == 3
    assert decode(TrainRecipe, yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())) == config


def test_stopped_and_resumed_is_as_never_stopped(
    recipe: Callable[..., TrainRecipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = run_recipe(recipe(output_dir=str(tmp_path / "whole")))
    real = EventsAt(3)
    with monkeypatch.context() as patch:
        patch.setattr("softprompts.training.to_tensorboard", real)
        with pytest.raises(TrainingInterrupted, match=r"Ctrl-C at step 3 of 6.*--resume"):
            run_recipe(recipe())
    with pytest.raises(ConfigError, match=r"unfinished run \(step 3 of 6\)"):
        run_recipe(recipe())
    with pytest.raises(CheckpointError, match=r"another recipe: prompt\.length \(3 -> 4\)"):
        run_recipe(recipe(prompt={"length": 4}), resume=True)
    resumed = run_recipe(recipe(), resume=True)
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")
    assert resumed["metrics"] == whole["metrics"]
    again = run_recipe(recipe(), resume=True)
    assert again["metrics"] == whole["metrics"]


def test_a_folder_that_another_run_writes_to_is_left_alone(recipe: Callable[..., TrainRecipe], tmp_path: Path):
    with alone_in(tmp_path / "run"):
        for resume in (False, True):
            with pytest.raises(StorageError, match="another run writes to"):
                run_recipe(recipe(), resume=resume)
        assert not (tmp_path / "run" / "recipe.yaml").exists()
    assert run_recipe(recipe())["steps"] == 6


class EventsAt:
    """Stands for a listener that presses Ctrl-C at some step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, directory: Path) -> EventsAt:
        return self

    def __enter__(self) -> Callable[[Mapping[str, Any]], None]:
        def on_event(event: Mapping[str, Any]) -> None:
            if event["event"] == "step" and event["step"] == self.step:
                os.kill(os.getpid(), signal.SIGINT)

        return on_event

    def __exit__(self, *_: object) -> None: ...


def test_fine_tuning_is_the_same_verb(recipe: Callable[..., TrainRecipe], tmp_path: Path):
    result = run_recipe(recipe(method="fine_tuning", optimizer={"learning_rate": 0.002}))
    assert result["trained_parameters"] == result["model_parameters"] > 10_000
    assert result["metrics"]["loss"] < result["reference_loss"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").config.model_type == "gpt2"


def test_a_prompt_can_start_from_a_saved_one(recipe: Callable[..., TrainRecipe], tmp_path: Path):
    first = run_recipe(recipe())
    start = {"initializer": {"name": "prompt", "prompt": first["saved"]}}
    second = run_recipe(recipe(prompt=start, output_dir=str(tmp_path / "second")))
    losses = [event["loss"] for event in timeless(tmp_path / "run") if event["event"] == "step"]
    warm = [event["loss"] for event in timeless(tmp_path / "second") if event["event"] == "step"]
    assert warm[0] < losses[0]
    assert second["metrics"]["loss"] < first["metrics"]["loss"]


def test_without_dev_split_the_last_prompt_is_saved(recipe: Callable[..., TrainRecipe], tmp_path: Path):
    result = run_recipe(recipe(task={"dev": None}))
    assert (result["metrics"], result["best_step"]) == ({}, 0)
    assert (tmp_path / "run" / "prompt" / "prompt.json").exists()
    with pytest.raises(ConfigError, match="has no dev split"):
        run_recipe(recipe(task={"dev": None}, evaluation={"selection": "exact_match"}))


def test_mistakes_are_reported_before_the_model_is_loaded(recipe: Callable[..., TrainRecipe]):
    nowhere = {"name_or_path": "/nowhere"}
    with pytest.raises(ConfigError, match="unknown metric 'exact_mach': did you mean 'exact_match'"):
        run_recipe(recipe(model=nowhere, evaluation={"selection": "exact_mach"}))
    with pytest.raises(ConfigError, match="unknown task 'record'"):
        run_recipe(recipe(model=nowhere, task={"name": "record"}))


def test_a_row_that_does_not_fit_behind_its_prompt_is_refused_before_training(
    recipe: Callable[..., TrainRecipe], tmp_path: Path
):
    with pytest.raises(LengthError, match="behind a prompt of 250"):
        run_recipe(recipe(prompt={"length": 250}))
    assert not (tmp_path / "run" / "events.jsonl").exists()


def test_an_output_directory_that_cannot_be_made_is_named(recipe: Callable[..., TrainRecipe], tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written: Not a directory"):
        run_recipe(recipe(output_dir=str(tmp_path / "file" / "run")))


def test_the_verb_reads_overrides_and_writes_json(
    recipe: Callable[..., TrainRecipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run_recipe(recipe(training={"max_steps": 1}))
    command = ["train", str(tmp_path / "run" / "recipe.yaml"), "--set", "training.max_steps=2", "--json", "-"]
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--output", str(tmp_path / "other")])
    said = capsys.readouterr()
    assert exit_.value.code == 0, said.err
    result = json.loads(said.out)
    assert (result["verb"], result["steps"], result["output_dir"]) == ("train", 2, str(tmp_path / "other"))
    assert "parameters to train" in said.err
    assert "saved in" in said.err
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--set", "training.max_step=3"])
    assert exit_.value.code == 2
    assert "did you mean 'max_steps'" in capsys.readouterr().err


def test_templates_are_options_of_the_verb(recipe: Callable[..., TrainRecipe], tmp_path: Path):
    run_recipe(recipe(training={"max_steps": 1}))
    command = ["train", str(tmp_path / "run" / "recipe.yaml"), "--output", str(tmp_path / "other")]
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--format", "It says: {animal} So:", "--target", "{sound}!"])
    assert exit_.value.code == 0
    task = yaml.safe_load((tmp_path / "other" / "recipe.yaml").read_text())["task"]
    assert (task["format"], task["target"]) == ("It says: {animal} So:", "{sound}!")
