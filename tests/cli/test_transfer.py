"""`softprompts transfer`, whole: two tiny models, a few records, everything on disk."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from transformers import PreTrainedTokenizerFast

from conftest import SIZES, tiny_model
from softprompts.cli.judging import Judgement
from softprompts.cli.main import main
from softprompts.cli.train import run_recipe
from softprompts.cli.transfer_models import transfer_models
from softprompts.cli.transfer_tasks import warm_start
from softprompts.cli.transfer_texts import read_texts
from softprompts.config import TrainRecipe, TransferRecipe, decode, to_dict
from softprompts.errors import CheckpointError, ConfigError
from softprompts.models import FrozenLM
from softprompts.storage import load_prompt, read_info
from softprompts.training import read_events
from softprompts.transfer import load_projector
from softprompts.types import MetricValue

ANIMALS = {"cat": "meow", "dog": "woof", "cow": "moo", "owl": "hoot"}
MOODS = {"great": "good", "awful": "bad", "lovely": "good", "nasty": "bad"}
TASKS = {
    "animals": ("The {word} says", ANIMALS),
    "moods": ("It was {word} so", MOODS),
    "again": ("Very {word} hence", MOODS),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Two models with one vocabulary, and a trained prompt per task on each of them."""
    root = tmp_path_factory.mktemp("world")
    tiny_model("llama").save_pretrained(root / "small")
    sizes = {**SIZES, "hidden_size": 48, "num_hidden_layers": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        large = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
        with torch.no_grad():
            for parameter in large.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.15)
    large.save_pretrained(root / "large")
    for model in ("small", "large"):
        tokenizer.save_pretrained(root / model)
        for name in TASKS:
            run_recipe(recipe(root, name, model))
    (root / "texts.txt").write_text("\n".join(f"The {word} says it was nice" for word in [*ANIMALS, *MOODS]))
    return root


def recipe(root: Path, name: str, model: str = "small", **prompt: Any) -> TrainRecipe:
    template, words = TASKS[name]
    file = root / f"{name}.jsonl"
    if not file.exists():
        file.write_text("\n".join(json.dumps({"word": word, "answer": answer}) for word, answer in words.items()))
    split = {"train": str(file), "dev": str(file)}
    start = {"name": "vocabulary", **prompt.pop("initializer", {})}
    settings = {
        "model": {"name_or_path": str(root / model), "device": "cpu", "precision": "float32"},
        "task": {"name": "records", "format": template, "target": "{answer}", **split},
        "prompt": {"kind": "embedding", "length": 3, "initializer": start, **prompt},
        "optimizer": {"learning_rate": 0.03},
        "training": {"max_steps": 4, "batch_size": 4, "validate_every_steps": 2, "checkpoint_every_steps": 2},
        "output_dir": str(root / model / "prompts" / name),
    }
    return decode(TrainRecipe, settings)


def transfer_recipe(root: Path, tmp_path: Path, **changes: Any) -> TransferRecipe:
    def place(model: str, name: str) -> str:
        return str(root / model / "prompts" / name / "prompt")

    models = {
        key: {"name_or_path": str(root / model), "device": "cpu", "precision": "float32"}
        for key, model in (("source_model", "small"), ("target_model", "large"))
    }
    settings: dict[str, Any] = {
        **models,
        "prompts": [place("small", "animals")],
        "judge": {"own": [place("large", "animals")]},
        "pairs": [{"source": place("small", name), "target": place("large", name)} for name in ("moods", "again")],
        "projector": {"hidden_size": 8},
        "match": {"texts": str(root / "texts.txt")},
        "optimizer": {"learning_rate": 0.02},
        "training": {"max_steps": 4, "batch_size": 4, "validate_every_steps": 2, "checkpoint_every_steps": 2},
        "output_dir": str(tmp_path / "out"),
    }
    return decode(TransferRecipe, {**settings, **changes})


def call(*words: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    return int(caught.value.code or 0)


@pytest.mark.parametrize("method", ["copy", "random", "least_squares", "projector", "match"])
def test_every_method_leaves_an_ordinary_prompt_for_the_target(world: Path, tmp_path: Path, method: str):
    config = transfer_recipe(world, tmp_path, method=method)
    if method == "copy":  # widths differ: refused
        with pytest.raises(ValueError, match="cannot be copied to 'large'"):
            transfer_models(config)
        return
    result = transfer_models(config)
    one = result["prompts"][0]
    target = FrozenLM.load(world / "large", device="cpu")
    loaded = load_prompt(one["saved"], target)
    assert loaded.info.origin.source.startswith(f"transferred by {method}")
    assert "small" in loaded.info.origin.source
    assert decode(TrainRecipe, loaded.info.origin.recipe).model.name_or_path == str(world / "large")
    none, own, transferred = (one[key]["value"] for key in ("none", "own", "transferred"))
    assert one["recovery"] == pytest.approx((transferred - none) / (own - none))
    assert loaded.info.origin.metrics["loss"].value == pytest.approx(transferred)
    if method == "match":
        assert one["training"]["metrics"]["loss"] < one["training"]["held_out_loss_before"]
        assert one["start"]["value"] != transferred


def test_a_model_transferred_to_itself_recovers_everything(world: Path, tmp_path: Path):
    one_model = {"name_or_path": str(world / "small"), "device": "cpu", "precision": "float32"}
    own = str(world / "small" / "prompts" / "animals" / "prompt")
    for method in ("copy", "least_squares"):
        config = transfer_recipe(
            world,
            tmp_path,
            method=method,
            target_model=one_model,
            judge={"own": [own]},
            output_dir=str(tmp_path / method),
        )
        assert transfer_models(config)["prompts"][0]["recovery"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("objective", ["distance", "task", "both"])
def test_a_projector_is_trained_saved_and_used_again(world: Path, tmp_path: Path, objective: str):
    projector = {"hidden_size": 8, "objective": objective}
    first = transfer_models(transfer_recipe(world, tmp_path, method="projector", projector=projector))
    place = tmp_path / "out" / "projector"
    loaded = load_projector(place)
    assert loaded.training["objective"] == objective
    assert loaded.training["tasks"] == ["records", "records"]
    again = transfer_recipe(
        world,
        tmp_path,
        method="projector",
        pairs=[],
        output_dir=str(tmp_path / "again"),
        projector={"path": str(place)},
    )
    second = transfer_models(again)
    assert first["prompts"][0]["transferred"] == second["prompts"][0]["transferred"]
    with pytest.raises(ConfigError, match="something to learn from"):
        transfer_models(transfer_recipe(world, tmp_path, method="projector", pairs=[]))


def test_distance_falls_and_needs_the_targets_own_prompts(world: Path, tmp_path: Path):
    far = {"hidden_size": 8, "objective": "distance"}
    config = transfer_recipe(
        world, tmp_path, method="projector", projector=far, training={"max_steps": 30, "validate_every_steps": 50}
    )
    transfer_models(config)
    events = read_events(tmp_path / "out" / "projector-run" / "events.jsonl")
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert losses[-1] < losses[0] / 2
    pair = {"source": config.pairs[0].source}
    with pytest.raises(ConfigError, match="names none; set its target"):
        transfer_models(
            transfer_recipe(
                world, tmp_path, method="projector", projector=far, pairs=[pair], output_dir=str(tmp_path / "other")
            )
        )


def test_a_stopped_match_goes_on_and_finished_work_is_kept(world: Path, tmp_path: Path):
    whole = transfer_models(transfer_recipe(world, tmp_path, output_dir=str(tmp_path / "whole")))
    config = transfer_recipe(world, tmp_path)
    transfer_models(config)
    with pytest.raises(CheckpointError, match=r"another recipe: match.alpha"):
        transfer_models(transfer_recipe(world, tmp_path, match={**vars_of(config), "alpha": 0.1}), resume=True)
    (tmp_path / "out" / "animals" / "result.json").unlink()
    resumed = transfer_models(config, resume=True)
    assert resumed["prompts"][0]["transferred"] == whole["prompts"][0]["transferred"]


def test_a_match_draws_random_batches_where_rows_are_packed(world: Path, tmp_path: Path):
    file = tmp_path / "texts.txt"
    file.write_text("\n".join("so nice " * (1 + number % 4) + f"{number}" for number in range(20)))
    losses = {}
    for batching in ("auto", "random", "length"):
        steps = {"max_steps": 3, "batch_size": 4, "batching": batching}
        changes = {"match": {"texts": str(file)}, "training": steps, "output_dir": str(tmp_path / batching)}
        losses[batching] = transfer_models(transfer_recipe(world, tmp_path, **changes))["prompts"][0]["transferred"]
    assert losses["auto"] == losses["random"] != losses["length"]


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_only_line_feeds_part_texts(tmp_path: Path, suffix: str):
    texts = ["one\u2028two", "three\u0085four\u2029five", "six"]
    lines = texts if suffix == "txt" else [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    file = tmp_path / f"texts.{suffix}"
    file.write_bytes("\r\n".join([*lines, "", ""]).encode())
    assert read_texts(file) == texts


def vars_of(config: TransferRecipe) -> dict[str, Any]:
    return {"texts": config.match.texts}


@pytest.mark.parametrize(("answers", "positions"), [("source", "all"), ("source", "answer"), ("none", "answer")])
def test_inputs_of_a_task_are_texts_too(world: Path, tmp_path: Path, answers: str, positions: str):
    task = {"name": "records", "train": str(world / "moods.jsonl"), "format": "It was {word} so", "target": "{answer}"}
    match = {"task": task, "answers": answers, "positions": positions, "top_k": 20, "start": "random"}
    result = transfer_models(transfer_recipe(world, tmp_path, match=match))
    assert result["prompts"][0]["training"]["texts"] == len(MOODS)
    both = {**match, "texts": str(world / "texts.txt")}
    with pytest.raises(ConfigError, match="and not both"):
        transfer_models(transfer_recipe(world, tmp_path, match=both, output_dir=str(tmp_path / "o")))


def test_the_verb_writes_a_recipe_from_its_options(world: Path, tmp_path: Path):
    prompt = world / "small" / "prompts" / "animals" / "prompt"
    words = ["--source-model", world / "small", "--target-model", world / "large", "--method", "random"]
    out = tmp_path / "cli"
    assert call("transfer", "models", prompt, *words, "--output", out, "--json", tmp_path / "r.json") == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["method"], found["prompts"][0]["recovery"]) == ("random", None)
    assert read_info(out / "animals" / "prompt").model.name == "large"
    assert call("transfer", "models", prompt, *words, "--method", "magic") == 2


# --- across tasks ----------------------------------------------------------------------------------------------------


@pytest.fixture
def library(world: Path, tmp_path: Path) -> Callable[..., Path]:
    """A folder of prompts whose tasks have names of their own in the manifest."""
    from softprompts.storage import save_prompt

    def make() -> Path:
        frozen = FrozenLM.load(world / "small", device="cpu")
        for name in TASKS:
            loaded = load_prompt(world / "small" / "prompts" / name / "prompt", frozen)
            save_prompt(
                loaded.prompt,
                tmp_path / "library" / name,
                frozen=frozen,
                task=name,
                recipe=to_dict(recipe(world, name)),
                overwrite=True,
            )
        return tmp_path / "library"

    return make


def test_every_prompt_on_every_task_cell_by_cell(
    world: Path, tmp_path: Path, library: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    folder = library()
    words = ["transfer", "tasks", folder, "--output", tmp_path / "m", "--json", tmp_path / "m.json"]
    words += ["--similarity", "cosine", "--type", "animals=sounds", "--type", "moods=mood", "--type", "again=mood"]
    assert call(*words) == 0
    found = json.loads((tmp_path / "m.json").read_text())
    matrix = found["matrix"]
    assert matrix["tasks"] == matrix["prompts"] == matrix["trained_on"] == ["again", "animals", "moods"]
    assert [found["relative_KM"][k][k] for k in range(3)] == [1.0, 1.0, 1.0]
    assert found["type_means"]["same_cells"] == 2
    assert found["correlation"]["cosine"]["cells"] == 6
    assert set(found["best_source"]) == set(TASKS)
    cells = sorted((tmp_path / "m" / "cells").rglob("*.json"))
    assert len(cells) == 9
    one = load_prompt(folder / "moods", FrozenLM.load(world / "small", device="cpu"))
    config = recipe(world, "animals")
    assert matrix["scores_KM"][2][1] == pytest.approx(alone(one.prompt, config), rel=1e-5)
    cells[0].unlink()
    seen = []
    real = __import__("softprompts.cli.judging", fromlist=["judge"]).judge
    monkeypatch.setattr("softprompts.cli.judging.judge", lambda f, p, *rest: seen.append(len(p)) or real(f, p, *rest))
    assert call(*words) == 0
    assert seen == [1]
    assert json.loads((tmp_path / "m.json").read_text())["matrix"]["scores_KM"] == matrix["scores_KM"]


def test_a_prompt_without_a_score_and_a_damaged_cell(
    tmp_path: Path, library: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The first prompt's loss is no number: null in the matrix, never the best source, and read again as it was."""
    real = __import__("softprompts.cli.judging", fromlist=["judge"]).judge

    def diverged(*given: Any) -> Any:
        found = real(*given)
        lost = dataclasses.replace(found.prompts[0], value=math.nan, stderr=math.nan)
        return dataclasses.replace(found, prompts=(lost, *found.prompts[1:]))

    monkeypatch.setattr("softprompts.cli.judging.judge", diverged)
    words = ["transfer", "tasks", library(), "--output", tmp_path / "m", "--json", tmp_path / "m.json"]
    for _ in range(2):
        assert call(*words, "--similarity", "cosine") == 0
        found = json.loads((tmp_path / "m.json").read_text())
        known = [[value is not None for value in row] for row in found["matrix"]["scores_KM"]]
        assert known == [[False] * 3, [True] * 3, [True] * 3]
        assert "again" not in found["best_source"].values()
    cell = next((tmp_path / "m" / "cells").rglob("*.json"))
    cell.write_text(cell.read_text()[:30])
    capsys.readouterr()
    assert call(*words) == 2
    assert "delete it" in " ".join(capsys.readouterr().err.split())
    cell.unlink()
    assert call(*words) == 0


def test_a_cut_result_of_a_finished_prompt_is_named(world: Path, tmp_path: Path):
    config = transfer_recipe(world, tmp_path, method="random")
    transfer_models(config)
    (tmp_path / "out" / "animals" / "result.json").write_text('{"name": ')
    with pytest.raises(CheckpointError, match=r"result\.json' is damaged: .*; delete it"):
        transfer_models(config, resume=True)


def alone(prompt: Any, config: TrainRecipe) -> float:
    """Loss of one prompt on a task in the plain way."""
    from softprompts.cli.loading import encode_rows, load_frozen
    from softprompts.evaluation.evaluate import target_losses
    from softprompts.prompted import PromptedLM
    from softprompts.tasks import get_task

    frozen, task = load_frozen(config.model), get_task(config.task)
    rows = encode_rows(task.load("dev", config.task), task, frozen, config.task)
    return target_losses(PromptedLM(frozen, [prompt]), rows).loss.value


def test_steps_to_another_runs_score(world: Path, tmp_path: Path):
    runs = world / "small" / "prompts"
    assert call("transfer", "steps", runs / "moods", "--own", runs / "animals", "--json", tmp_path / "s.json") == 0
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["steps"][str(runs / "animals")] == 4
    assert call("transfer", "steps", tmp_path, "--own", runs / "animals") == 2


def test_training_starts_from_the_best_prompt_of_a_library(world: Path, tmp_path: Path, library: Callable[..., Path]):
    folder = library()
    path = tmp_path / "recipe.yaml"
    # the task of a recipe is called records, so every prompt of the library is of another task
    path.write_text(yaml.safe_dump(json.loads(json.dumps(to_dict(recipe(world, "moods"))))))
    words = ["train", path, "--from-library", folder]
    assert call(*words, "--output", tmp_path / "warm") == 0
    chosen = yaml.safe_load((tmp_path / "warm" / "recipe.yaml").read_text())["prompt"]["initializer"]
    frozen = FrozenLM.load(world / "small", device="cpu")
    losses = {name: alone(load_prompt(folder / name, frozen).prompt, recipe(world, "moods")) for name in TASKS}
    assert chosen["name"] == "prompt"
    assert Path(chosen["prompt"]).name == min(losses, key=losses.__getitem__)
    like = ["--by", "cosine", "--like", folder / "moods"]
    assert call(*words, *like, "--output", tmp_path / "like") == 0
    chosen = yaml.safe_load((tmp_path / "like" / "recipe.yaml").read_text())["prompt"]["initializer"]
    assert Path(chosen["prompt"]).name == "moods"
    assert call(*words, "--by", "cosine", "--output", tmp_path / "x") == 2
    assert call(*words, "--by", "cosin", "--like", folder / "moods", "--output", tmp_path / "x") == 2


def test_a_prompt_without_a_score_is_not_started_from(world: Path, library: Callable[..., Path], monkeypatch: Any):
    config, losses = recipe(world, "moods"), [math.nan, 2.0, 1.0]

    def judged(*_: Any) -> Judgement:
        return Judgement("loss", False, 1, MetricValue(0.0, None), tuple(MetricValue(one, None) for one in losses))

    monkeypatch.setattr("softprompts.cli.judging.judge", judged)
    assert Path(str(warm_start(config, library(), "zero-shot").prompt.initializer.prompt)).name == sorted(TASKS)[2]
    losses[:] = [math.nan] * 3
    with pytest.raises(ConfigError, match="no prompt of the library has a score"):
        warm_start(config, library(), "zero-shot")


@pytest.mark.parametrize("way", [{"name": "none"}, {"name": "residual"}, {"name": "mlp", "start": "closed_form"}])
def test_a_warm_start_is_exactly_the_saved_prompt(world: Path, way: dict[str, Any]):
    from softprompts.prompts import build_prompt

    frozen = FrozenLM.load(world / "small", device="cpu")
    saved = load_prompt(world / "small" / "prompts" / "moods" / "prompt", frozen).prompt
    start = {"name": "prompt", "prompt": "somewhere"}
    config = recipe(world, "moods", reparametrization={**way, "hidden_size": 8}, initializer=start).prompt
    assert torch.allclose(build_prompt(config, frozen, seed=1, source=saved).table_PW, saved.table_PW, atol=1e-6)
    elsewhere = recipe(world, "moods", reparametrization={"name": "mlp"}, initializer=start).prompt
    with pytest.raises(ConfigError, match=r"'mlp with start none' would start elsewhere"):
        build_prompt(elsewhere, frozen, seed=1, source=saved)
    longer = recipe(world, "moods", length=5, initializer=start).prompt
    with pytest.raises(ValueError, match=r"has length 3, this one 5; set prompt.length=3"):
        build_prompt(longer, frozen, seed=1, source=saved)
