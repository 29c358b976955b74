"""Saving and loading: what comes back is what went in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from softprompts.config import PromptConfig, ReparamConfig, TrainRecipe, to_dict
from softprompts.errors import ArtifactError, PromptMismatchError, StorageError
from softprompts.models import FrozenLM
from softprompts.prompts import build_prompt, prompt_from_table
from softprompts.storage import load_prompt, read_info, save_prompt
from softprompts.types import MetricValue

FILES = ["README.md", "prompt.json", "prompt.safetensors"]


@pytest.mark.parametrize("kind", ["prefix", "embedding"])
def test_a_prompt_of_every_family_comes_back_bit_for_bit(frozen: FrozenLM, kind: str, tmp_path: Path):
    prompt = build_prompt(PromptConfig(kind=kind, length=4), frozen, seed=1)
    directory = save_prompt(prompt, tmp_path / "p", frozen=frozen)
    assert sorted(path.name for path in directory.iterdir()) == FILES
    loaded = load_prompt(directory, frozen)
    assert torch.equal(loaded.prompt.table_PW, prompt.table_PW)
    assert type(loaded.prompt) is type(prompt)
    assert loaded.prompt.geometry == loaded.info.geometry == frozen.geometry
    states, again = prompt(), loaded.prompt()
    for key, (keys, values) in states.keys_values.items():
        assert torch.equal(keys, again.keys_values[key][0])
        assert torch.equal(values, again.keys_values[key][1])


def test_tensors_have_readable_names_and_hold_what_the_prompt_yields(
    tiny_frozen: Callable[..., FrozenLM], tmp_path: Path
):
    frozen = tiny_frozen("qwen3")
    prefix = build_prompt(PromptConfig(kind="prefix", length=4), frozen, seed=1)
    tensors = load_file(save_prompt(prefix, tmp_path / "prefix", frozen=frozen) / "prompt.safetensors")
    states = prefix().keys_values
    assert len(tensors) == 2 * len(states) > 0
    for (site, layer), (keys, values) in states.items():
        assert torch.equal(tensors[f"{site}.{layer}.keys"], keys)
        assert torch.equal(tensors[f"{site}.{layer}.values"], values)
    embedding = build_prompt(PromptConfig(kind="embedding", length=4), frozen, seed=1)
    tensors = load_file(save_prompt(embedding, tmp_path / "embedding", frozen=frozen) / "prompt.safetensors")
    assert list(tensors) == ["embeddings"]
    assert torch.equal(tensors["embeddings"], embedding.table_PW)


def test_a_reparametrized_prompt_is_stored_folded(tiny_frozen: Callable[..., FrozenLM], tmp_path: Path):
    frozen = tiny_frozen("gpt2")
    config = PromptConfig(kind="prefix", length=4, reparametrization=ReparamConfig(name="mlp", hidden_size=8))
    prompt = build_prompt(config, frozen, seed=1)
    loaded = load_prompt(save_prompt(prompt, tmp_path / "p", frozen=frozen), frozen)
    assert torch.equal(loaded.prompt.table_PW, prompt.table_PW)
    assert loaded.info.parameters.trained == prompt.trained_parameters != prompt.stored_parameters
    assert loaded.info.parameters.stored == prompt.stored_parameters == loaded.prompt.trained_parameters


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["prefix", "embedding"])
def test_half_precision_halves_the_file_and_comes_back_as_float32(kind, dtype, model, make_prompt, tmp_path: Path):
    prompt = make_prompt(kind)
    directory = save_prompt(prompt, tmp_path / "p", frozen=model, dtype=dtype)
    loaded = load_prompt(directory, model)
    assert loaded.info.dtype == dtype
    assert {tensor.dtype for tensor in load_file(directory / "prompt.safetensors").values()} == {getattr(torch, dtype)}
    assert loaded.prompt.table_PW.dtype == torch.float32
    assert torch.equal(loaded.prompt.table_PW, prompt.table_PW.to(getattr(torch, dtype)).float())


def test_a_value_too_large_for_half_precision_is_not_stored_as_infinity(model, make_prompt, tmp_path: Path):
    table_PW = make_prompt("prefix").table_PW * 1e6
    with pytest.raises(ArtifactError, match="not finite in float16"):
        save_prompt(
            prompt_from_table("prefix", model.geometry, table_PW), tmp_path / "p", frozen=model, dtype="float16"
        )


def test_the_manifest_says_where_the_prompt_comes_from(saved: Path, model):
    info = read_info(saved)
    assert load_prompt(saved).info == info
    assert (info.length, info.dtype, info.geometry) == (3, "float32", model.geometry)
    assert (info.model.name, info.model.fingerprint) == (model.name, model.fingerprint)
    assert info.model.tokenizer_fingerprint == model.tokenizer_fingerprint
    assert info.parameters.stored == info.parameters.trained == 3 * info.width
    assert info.origin.task == "e2e"
    assert info.origin.seed == 3
    assert info.origin.recipe == {"training": {"seed": 3, "max_steps": 10}, "optimizer": {"learning_rate": 1e-5}}
    assert info.origin.metrics["bleu"] == MetricValue(0.68, 0.004, "bleu")
    assert info.origin.metrics["loss"] == MetricValue(1.25, None, "loss")
    assert info.origin.versions["torch"] == torch.__version__
    assert set(info.origin.versions) == {"softprompts", "torch", "transformers"}
    assert info.origin.created.endswith("+00:00")
    assert json.loads((saved / "prompt.json").read_text(encoding="utf-8"))["format_version"] == 1


def test_a_recipe_dataclass_is_resolved(model, make_prompt, tmp_path: Path):
    recipe = TrainRecipe()
    info = read_info(save_prompt(make_prompt("prefix"), tmp_path / "p", frozen=model, recipe=recipe, seed=9))
    assert info.origin.recipe == json.loads(json.dumps(to_dict(recipe)))
    assert info.origin.seed == 9


def test_a_metric_that_failed_does_not_lose_the_prompt(model, make_prompt, tmp_path: Path):
    metrics = {"perplexity": math.inf, "bleu": MetricValue(math.nan, math.nan)}
    info = read_info(save_prompt(make_prompt("prefix"), tmp_path / "p", frozen=model, metrics=metrics))
    assert math.isnan(info.origin.metrics["perplexity"].value)
    assert math.isnan(info.origin.metrics["bleu"].value)
    assert info.origin.metrics["bleu"].stderr is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_diverged_prompt_is_not_saved(value: float, model, make_prompt, tmp_path: Path):
    table_PW = make_prompt("prefix").table_PW
    table_PW[1, 5] = value
    with pytest.raises(ArtifactError, match="not finite"):
        save_prompt(prompt_from_table("prefix", model.geometry, table_PW), tmp_path / "p", frozen=model)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"recipe": {"model": object()}}, "not plain JSON data"),
        ({"recipe": {"learning_rate": math.nan}}, "not plain JSON data"),
        ({"recipe": {"text": "x" * (1 << 20)}}, "shorten the recipe"),
        ({"task": "red\x1b[31m"}, "printable"),
        ({"task": "t" * 600}, "printable"),
        ({"task": "\ud800"}, "not plain JSON data"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(metadata: dict[str, Any], said: str, model, make_prompt, tmp_path):
    with pytest.raises(ArtifactError, match=said):
        save_prompt(make_prompt("prefix"), tmp_path / "p", frozen=model, **metadata)
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_is_not_saved_under_the_name_of_another_model(model, make_prompt, tmp_path: Path):
    other = replace(model, geometry=replace(model.geometry, width=16))
    with pytest.raises(PromptMismatchError, match="nothing was written"):
        save_prompt(make_prompt("prefix"), tmp_path / "p", frozen=other)
    assert list(tmp_path.iterdir()) == []


def test_overwriting_has_to_be_asked_for(saved: Path, model, make_prompt):
    kind = read_info(saved).kind
    other = make_prompt(kind, length=5, seed=1)
    with pytest.raises(StorageError, match="overwrite=True"):
        save_prompt(other, saved, frozen=model)
    assert read_info(saved).length == 3
    save_prompt(other, saved, frozen=model, overwrite=True)
    assert torch.equal(load_prompt(saved, model).prompt.table_PW, other.table_PW)
    assert [path.name for path in saved.parent.iterdir()] == ["prompt"]


def test_the_same_prompt_gives_the_same_tensor_file(model, make_prompt, tmp_path: Path):
    one, two = (save_prompt(make_prompt("prefix"), tmp_path / name, frozen=model) for name in "ab")
    assert (one / "prompt.safetensors").read_bytes() == (two / "prompt.safetensors").read_bytes()
