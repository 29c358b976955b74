"""`softprompts train` with a list: each prompt is what it would be alone."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerFast

from softprompts.cli.main import main
from softprompts.cli.train import run_recipe
from softprompts.config import TrainRecipe, decode, member_recipes, varied
from softprompts.errors import CheckpointError, ConfigError, TrainingInterrupted
from softprompts.folder_lock import LOCK_FILE
from softprompts.models import FrozenLM
from softprompts.storage import load_prompt
from tiny_world import animal_task, animal_world, model_section
from training.toy import timeless

TOGETHER: list[dict[str, Any]] = [
    {"training.seed": 1},
    {"name": "longer", "prompt.length": 6, "prompt.kind": "embedding", "optimizer": {"learning_rate": 0.005}},
    {"training.max_steps": 20, "training.patience": 1, "optimizer.learning_rate": 1.0},
    {"name": "sounds", "task.format": "{sound} says the", "task.target": "{animal}", "training.batch_size": 3},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return animal_world(tmp_path_factory.mktemp("world"), tokenizer)


def recipe(world: Path, output: Path, together: Any = TOGETHER, **changes: Any) -> TrainRecipe:
    return decode(
        TrainRecipe,
        {
            "model": model_section(world),
            "task": animal_task(world),
            "prompt": {"kind": "prefix", "length": 3, "initializer": {"name": "text", "text": "sounds"}},
            "optimizer": {"learning_rate": 0.02},
            "training": {"max_steps": 6, "batch_size": 2, "validate_every_steps": 2, "checkpoint_every_steps": 2},
            "evaluation": {"selection": "exact_match", "decoding": {"max_new_tokens": 4}},
            "output_dir": str(output),
            "together": together,
            **changes,
        },
    )


def test_a_list_is_trained_as_one_after_the_other(world: Path, tmp_path: Path):
    config = recipe(world, tmp_path / "together")
    result = run_recipe(config)
    alone = member_recipes(recipe(world, tmp_path / "alone"))
    assert list(result["prompts"]) == list(alone)
    names = sorted(path.name for path in (tmp_path / "together").iterdir())
    assert names == sorted([LOCK_FILE, *alone, "recipe.yaml"])
    frozen = FrozenLM.load(world / "model", device="cpu")
    for name, member in alone.items():
        expected, found = run_recipe(member), result["prompts"][name]
        for key in ("steps", "reason", "best_step", "tokens", "trained_parameters", "task"):
            assert found[key] == expected[key], (name, key)
        assert found["reference_loss"] == pytest.approx(expected["reference_loss"], rel=1e-5)
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
        tables = [load_prompt(one["saved"], frozen).prompt.table_PW for one in (found, expected)]
        torch.testing.assert_close(*tables, rtol=1e-4, atol=1e-4)
        folders = [tmp_path / mode / name for mode in ("together", "alone")]
        assert sorted(path.name for path in folders[0].iterdir()) == sorted(path.name for path in folders[1].iterdir())
        for a, b in zip(timeless(folders[0]), timeless(folders[1]), strict=True):
            assert (a["event"], a["step"]) == (b["event"], b["step"])
            if a["event"] == "step":
                assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            if a["event"] == "validation":
                assert a["metrics"] == pytest.approx(b["metrics"], rel=1e-5)
    assert result["prompts"]["max_steps-20_patience-1_learning_rate-1.0"]["reason"] == "patience"


def interrupt_at(step: int) -> type:
    class Listener:
        def __init__(self, directory: Path) -> None:
            self.struck = directory.parent.name != "longer"

        def __enter__(self) -> Callable[[Mapping[str, Any]], None]:
            def on_event(event: Mapping[str, Any]) -> None:
                if event["event"] == "step" and event["step"] == step and not self.struck:
                    self.struck = True
                    os.kill(os.getpid(), signal.SIGINT)

            return on_event

        def __exit__(self, *_: object) -> None: ...

    return Listener


def test_a_list_stopped_and_resumed_is_as_never_stopped(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pair = TOGETHER[:2]
    whole = run_recipe(recipe(world, tmp_path / "whole", pair))
    with monkeypatch.context() as patch:
        patch.setattr("softprompts.training.to_tensorboard", interrupt_at(3))
        with pytest.raises(TrainingInterrupted, match=r"Ctrl-C at step 3 of 6.*1 other runs.*--resume"):
            run_recipe(recipe(world, tmp_path / "run", pair))
    with pytest.raises(ConfigError, match=r"unfinished run \(step 3 of 6\)"):
        run_recipe(recipe(world, tmp_path / "run", pair))
    changed = [{"training.seed": 1}, {**TOGETHER[1], "prompt.length": 7}]
    with pytest.raises(CheckpointError, match=r"another recipe: prompt\.length \(6 -> 7\)"):
        run_recipe(recipe(world, tmp_path / "run", changed), resume=True)
    resumed = run_recipe(recipe(world, tmp_path / "run", pair), resume=True)
    for name, one in whole["prompts"].items():
        assert timeless(tmp_path / "run" / name) == timeless(tmp_path / "whole" / name)
        assert resumed["prompts"][name]["metrics"] == one["metrics"]
    longer = [*pair, {"name": "late", "training.seed": 9}]
    grown = run_recipe(recipe(world, tmp_path / "run", longer), resume=True)
    assert [one["steps"] for one in grown["prompts"].values()] == [6, 6, 6]
    alone = run_recipe(
        decode(TrainRecipe, yaml.safe_load((tmp_path / "run/late/recipe.yaml").read_text())), resume=True
    )
    assert alone["metrics"] == grown["prompts"]["late"]["metrics"]


def test_one_that_diverges_saves_its_best_or_nothing(world: Path, tmp_path: Path):
    together = [{"name": "good"}, {"name": "bad", "optimizer.learning_rate": 1e30, "optimizer.name": "sgd"}]
    result = run_recipe(recipe(world, tmp_path, together, evaluation={}))
    bad = result["prompts"]["bad"]
    assert (result["prompts"]["good"]["reason"], bad["reason"], bad["best_step"]) == ("max_steps", "diverged", 0)
    assert bad["saved"] is None
    assert not (tmp_path / "bad" / "prompt").exists()
    assert (tmp_path / "good" / "prompt" / "prompt.json").exists()


def test_seeds_and_values_are_options_of_the_verb(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = recipe(world, tmp_path / "first", [], training={"max_steps": 2, "batch_size": 2})
    run_recipe(config)
    command = ["train", str(tmp_path / "first" / "recipe.yaml"), "--output", str(tmp_path / "run"), "--json", "-"]
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--seeds", "0,3", "--vary", "prompt.length=2,4"])
    said = capsys.readouterr()
    assert exit_.value.code == 0, said.err
    result = json.loads(said.out)
    names = ["length-2_seed-0", "length-2_seed-3", "length-4_seed-0", "length-4_seed-3"]
    assert list(result["prompts"]) == names
    assert result["tokens"] == sum(one["tokens"] for one in result["prompts"].values())
    assert [load_prompt(tmp_path / "run" / name / "prompt").prompt.length for name in names] == [2, 2, 4, 4]
    assert all(f"{name}: 2 steps in" in said.err for name in names)
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--vary", "model.dtype=float32,bfloat16"])
    assert exit_.value.code == 2
    assert "'model.dtype' cannot differ" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------------
# The recipe's list
# --------------------------------------------------------------------------------------------------------------------


def test_members_are_named_by_what_differs():
    config = decode(TrainRecipe, {"output_dir": "runs/x", "together": TOGETHER})
    members = member_recipes(config)
    assert list(members) == ["seed-1", "longer", "max_steps-20_patience-1_learning_rate-1.0", "sounds"]
    assert members["longer"].prompt.length == 6
    assert members["longer"].optimizer.learning_rate == 0.005
    assert members["longer"].optimizer.betas == config.optimizer.betas
    assert (members["seed-1"].output_dir, members["seed-1"].together) == ("runs/x/seed-1", ())
    assert decode(TrainRecipe, yaml.safe_load(yaml.safe_dump({"together": TOGETHER}))).together == config.together
    tasks = member_recipes(varied(TrainRecipe(), None, ["task.name=sst2,a/b"]))
    assert list(tasks) == ["task-sst2", "task-a-b"]
    assert list(member_recipes(decode(TrainRecipe, {"together": [{}, {"training.seed": 1}]}))) == ["base", "seed-1"]


def test_options_multiply_the_list():
    config = varied(decode(TrainRecipe, {"together": [{"name": "x"}, {"prompt.length": 3}]}), "0,1", [])
    assert list(member_recipes(config)) == ["x_seed-0", "x_seed-1", "length-3_seed-0", "length-3_seed-1"]
    assert varied(TrainRecipe(), None, []) == TrainRecipe()
    lists = varied(TrainRecipe(), None, ["prompt.initializer.labels=[[a, b], [c]]"])
    assert [one.prompt.initializer.labels for one in member_recipes(lists).values()] == [("a", "b"), ("c",)]


@pytest.mark.parametrize(
    ("together", "message"),
    [
        ([{"model.dtype": "bfloat16"}], r"'model.dtype' cannot differ \(together\[0\]\): the prompts share one"),
        ([{"model": {"dtype": "bfloat16"}}], r"'model.dtype' cannot differ"),
        ([{}, {"method": "fine_tuning"}], r"'method' cannot differ \(together\[1\]\)"),
        ([{"output_dir": "x"}], r"'output_dir' cannot differ.*give it a name"),
        ([{"training.rows_per_pass": 3}], "a forward pass belongs to all prompts"),
        ([{"together": []}], "'together' cannot differ"),
        ([{"training.sed": 1}], r"together\[0\] \('sed-1'\): unknown key 'training.sed': did you mean 'seed'"),
        ([{"prompt.length": "ten"}], r"'prompt.length' is 'ten'"),
        ([{"training.seed": 1}, {"training.seed": 1}], r"together\[1\] is called 'seed-1' like one before it"),
        ([{"name": "../x"}], "it becomes a folder"),
    ],
)
def test_mistakes_in_the_list_are_named(together: list[dict[str, Any]], message: str):
    with pytest.raises(ConfigError, match=message):
        member_recipes(decode(TrainRecipe, {"together": together}))


def test_mistakes_in_the_options_are_named():
    with pytest.raises(ConfigError, match=r"'training\.seed' is varied twice"):
        varied(TrainRecipe(), "1,2", ["training.seed=3"])
    with pytest.raises(ConfigError, match="names no value"):
        varied(TrainRecipe(), None, ["prompt.length="])
    with pytest.raises(ConfigError, match=r"not of the form a\.b=c"):
        varied(TrainRecipe(), None, ["prompt.length"])
    with pytest.raises(ConfigError, match="no list in YAML"):
        varied(TrainRecipe(), None, ["prompt.length=[1"])
    with pytest.raises(ConfigError, match="every run would need a copy"):
        run_recipe(decode(TrainRecipe, {"method": "fine_tuning", "together": [{}]}))
    with pytest.raises(ConfigError, match=r"'together' is 3 .*expected a list"):
        decode(TrainRecipe, {"together": 3})
