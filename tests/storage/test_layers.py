"""Prefixes that reach some layers only: saved, loaded, and refused where the file does not say which."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from softprompts.errors import ArtifactError
from softprompts.prompts import prompt_from_table
from softprompts.storage import load_prompt, save_prompt
from softprompts.storage.manifest import parse_manifest
from softprompts.types import Geometry, KeyValueSite, LayerKey

SITES = tuple(
    KeyValueSite(LayerKey(site, layer), kv_heads=2, key_size=4, value_size=4)
    for site, depth in (("encoder", 1), ("decoder", 2), ("cross", 2))
    for layer in range(depth)
)
GEOMETRY = Geometry(family="t5", width=12, vocab_size=50, max_positions=None, sites=SITES)
CHOSEN = (LayerKey("decoder", 1), LayerKey("cross", 0))


@pytest.fixture
def directory(tmp_path: Path, model: Any) -> Path:
    table_PW = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    prompt = prompt_from_table("prefix", GEOMETRY, table_PW, CHOSEN[::-1])
    return save_prompt(prompt, tmp_path / "prompt", frozen=replace(model, geometry=GEOMETRY))


def test_a_prefix_on_some_layers_comes_back_as_it_was(directory: Path, model: Any) -> None:
    loaded = load_prompt(directory, replace(model, geometry=GEOMETRY))
    assert loaded.prompt.layers == loaded.info.layers == CHOSEN
    assert loaded.info.parameters.stored == loaded.info.length * loaded.info.width == 3 * 32
    assert list(loaded.prompt().keys_values) == list(CHOSEN)
    table_PW = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.prompt.table_PW, table_PW)
    tensors = load_file(directory / "prompt.safetensors")
    assert sorted(tensors) == ["cross.0.keys", "cross.0.values", "decoder.1.keys", "decoder.1.values"]
    assert torch.equal(tensors["decoder.1.keys"], table_PW[:, :8].unflatten(1, (2, 4)).transpose(0, 1))


def test_a_prefix_on_all_layers_is_written_as_ever(tmp_path: Path, model: Any, make_prompt: Callable[..., Any]) -> None:
    everywhere = save_prompt(make_prompt("prefix"), tmp_path / "all", frozen=model)
    assert "layers" not in json.loads((everywhere / "prompt.json").read_text())
    named = prompt_from_table("prefix", GEOMETRY, torch.zeros(2, 80), [site.key for site in SITES])
    assert named.layers is None  # all layers by name are no choice


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        (["decoder.1", "cross.7"], "'cross.7' among them"),
        (["decoder.1", "decoder.1"], "each once"),
        ([], "names 0 layers"),
        ([f"{site.key.site}.{site.key.layer}" for site in SITES], "not all"),
    ],
)
def test_layers_that_cannot_be_are_refused(directory: Path, layers: list[str], why: str) -> None:
    mapping = json.loads((directory / "prompt.json").read_text())
    mapping["layers"], mapping["digest"] = layers, "0" * 64
    blank = (json.dumps(mapping, indent=2) + "\n").encode()
    digest = hashlib.sha256(blank).hexdigest()
    with pytest.raises(ArtifactError, match=why):
        parse_manifest(blank.replace(b"0" * 64, digest.encode(), 1))
