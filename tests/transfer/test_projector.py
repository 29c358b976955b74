"""Projectors: shapes, what is trained, what is refused, and that what is saved comes back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from softprompts.config import InitConfig, ProjectorConfig, PromptConfig
from softprompts.errors import ArtifactError, LengthError, PromptMismatchError, StorageError
from softprompts.models import FrozenLM
from softprompts.prompted import PromptedLM
from softprompts.prompts import SoftPrompt, build_prompt
from softprompts.tasks.encode import collate
from softprompts.transfer import (
    Projector,
    PromptSpace,
    load_projector,
    projected_prompt,
    projection_distance,
    save_projector,
    word_spread,
)
from softprompts.transfer.projector import depth_map
from softprompts.types import Encoded, Example
from zoo_seq2seq import tiny_seq2seq, with_end

KINDS = ["flatten", "token", "linear"]


def prompt_of(frozen: FrozenLM, kind: str, seed: int = 0, **settings: object) -> SoftPrompt:
    config = PromptConfig(kind=kind, length=4, initializer=InitConfig(name="vocabulary"), **settings)  # type: ignore[arg-type]
    return build_prompt(config, frozen, seed=seed)


def projector_for(prompt: SoftPrompt, target: FrozenLM, way: str, **config: object) -> Projector:
    space = PromptSpace.of(prompt)
    settings = ProjectorConfig(kind=way, hidden_size=16, **config)  # type: ignore[arg-type]
    return Projector(space, space.on(target.geometry), settings, seed=3)


@pytest.mark.parametrize("way", KINDS)
@pytest.mark.parametrize("kind", ["embedding", "prefix"])
def test_a_projected_prompt_is_one_of_the_target(source: FrozenLM, target: FrozenLM, kind: str, way: str):
    prompt = prompt_of(source, kind)
    projector = projector_for(prompt, target, way)
    projected = projected_prompt(projector, prompt)
    own = prompt_of(target, kind)
    assert projected.table().shape == own.table().shape
    batch = collate([Encoded((65, 66, 67), 1, Example("", ""))], pad_id=target.pad_id)
    prompted = PromptedLM(target, [projected])
    before = [weight.clone() for weight in target.model.parameters()]
    prompted.label_losses(batch).losses_M.sum().backward()
    trained = dict(prompted.prompts.named_parameters())
    assert {id(weight) for weight in trained.values()} == {id(weight) for weight in projector.parameters()}
    assert all(weight.grad is not None and bool(weight.grad.abs().sum() > 0) for weight in projector.nets.parameters())
    assert all(weight.grad is None for weight in target.model.parameters())
    assert all(weight.grad is None for weight in prompt.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, target.model.parameters(), strict=True))
    assert torch.equal(projected.fold().table_PW, projected.table_PW)


def test_flatten_is_the_papers_map(source: FrozenLM, target: FrozenLM):
    prompt = prompt_of(source, "embedding")
    projector = projector_for(prompt, target, "flatten")
    first, last = (module for module in projector.nets.modules() if isinstance(module, torch.nn.Linear))
    norm = projector.norms[0]
    inner = torch.nn.functional.leaky_relu(prompt.table_PW.reshape(-1) @ first.weight.T + first.bias)
    plain = (inner @ last.weight.T + last.bias).reshape(4, target.geometry.width)
    plain = (plain - plain.mean(1, keepdim=True)) / (plain.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    assert torch.allclose(projector(prompt.table_PW), plain * norm.weight + norm.bias, atol=1e-5)


def test_pieces_of_a_prefix_are_mapped_apart_by_depth(source: FrozenLM, target: FrozenLM):
    assert depth_map([0, 1, 2], [0, 1, 2, 3, 4]) == {0: 0, 1: 1, 2: 1, 3: 2, 4: 2}
    assert depth_map([0, 1, 2, 3, 4], [0, 1, 2]) == {0: 0, 1: 2, 2: 4}
    assert depth_map([0, 1, 2], [7]) == {7: 2}
    prompt = prompt_of(source, "prefix")
    projector = projector_for(prompt, target, "token")
    table, changed = prompt.table_PW, prompt.table_PW
    widths = list(projector.source.pieces.values())
    changed[:, 2 * widths[0] : 3 * widths[0]] += 1  # keys of the source's second layer
    parts = [projector(given).split(list(projector.target.pieces.values()), dim=1) for given in (table, changed)]
    moved = [name for name, a, b in zip(projector.target.pieces, *parts, strict=True) if not torch.equal(a, b)]
    assert moved == [("self", 1, "keys"), ("self", 2, "keys")]


def test_a_layer_norm_starts_at_the_spread_of_words(source: FrozenLM, target: FrozenLM):
    prompt = prompt_of(source, "embedding")
    space = PromptSpace.of(prompt)
    spread = word_spread(target)
    projector = Projector(space, space.on(target.geometry), ProjectorConfig(), norm_scale=spread)
    assert float(projector(prompt.table_PW).detach().std()) == pytest.approx(spread, rel=0.05)
    assert not projector_for(prompt_of(source, "prefix"), target, "linear").norms
    assert projector_for(prompt_of(source, "prefix"), target, "linear", norm="layer").norms


def test_distance_is_the_mean_squared_error_of_each_pair(source: FrozenLM, target: FrozenLM):
    prompts = [prompt_of(source, "embedding", seed) for seed in (1, 2)]
    owns = [prompt_of(target, "embedding", seed) for seed in (1, 2)]
    projector = projector_for(prompts[0], target, "token")
    pairs = [(a.table_PW, b.table_PW) for a, b in zip(prompts, owns, strict=True)]
    plain = sum(float((projector(a) - b).square().mean().detach()) for a, b in pairs)
    assert float(projection_distance(projector, pairs).detach()) == pytest.approx(plain, rel=1e-5)


def test_what_does_not_fit_is_refused(source: FrozenLM, target: FrozenLM, llama: Callable[..., FrozenLM]):
    embedding, prefix = prompt_of(source, "embedding"), prompt_of(source, "prefix")
    with pytest.raises(PromptMismatchError, match="turns no embedding prompt"):
        Projector(PromptSpace.of(embedding), PromptSpace.of(prefix), ProjectorConfig())
    short = PromptSpace("embedding", 2, target.geometry)
    with pytest.raises(LengthError, match=r"4 positions and the target 2"):
        Projector(PromptSpace.of(embedding), short, ProjectorConfig())
    with pytest.raises(PromptMismatchError, match="the projector is for embedding prompts of length 4"):
        projected_prompt(projector_for(embedding, target, "token"), prefix)


def test_a_prefix_on_some_layers_goes_to_all_layers(source: FrozenLM, target: FrozenLM):
    prompt = prompt_of(source, "prefix", layers=(1,))
    projected = projected_prompt(projector_for(prompt, target, "linear"), prompt)
    assert (prompt.layers, projected.layers) == ((("self", 1),), None)
    assert projected.table_PW.shape == (4, target.geometry.prefix_width)


@pytest.mark.parametrize("kind", ["embedding", "prefix"])
def test_saved_and_loaded_it_maps_alike(source: FrozenLM, target: FrozenLM, tmp_path: Path, kind: str):
    prompt = prompt_of(source, kind)
    projector = projector_for(prompt, target, "flatten")
    place = save_projector(projector, tmp_path / "p", source=source, target=target, training={"tasks": ["a"]})
    loaded = load_projector(place, source=source, target=target)
    assert torch.equal(loaded.projector(prompt.table_PW), projector(prompt.table_PW))
    assert (loaded.training, loaded.source_model.name) == ({"tasks": ["a"]}, source.name)
    assert loaded.projector.config == projector.config
    with pytest.raises(StorageError, match="holds a prompt already"):
        save_projector(projector, place, source=source, target=target)
    with pytest.raises(PromptMismatchError, match="target model 'llama-48x5'"):
        load_projector(place, target=source)
    with pytest.raises(PromptMismatchError, match="pass the models"):
        save_projector(projector, tmp_path / "q", source=target, target=target)


def test_damage_is_noticed(source: FrozenLM, target: FrozenLM, tmp_path: Path):
    projector = projector_for(prompt_of(source, "embedding"), target, "linear")
    place = save_projector(projector, tmp_path / "p", source=source, target=target)
    file = place / "projector.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"!")
    with pytest.raises(ArtifactError, match="was damaged"):
        load_projector(place)
    file.write_bytes(content)
    manifest = json.loads((place / "projector.json").read_text())
    for key, value in (("length", 10**9), ("kind", "picture"), ("surprise", 1)):
        (place / "projector.json").write_text(json.dumps({**manifest, key: value}))
        if key == "length":  # of a linear map it changes no weight
            assert load_projector(place).projector.source.length == value
            continue
        with pytest.raises(ArtifactError, match=r"projector\.json"):
            load_projector(place)
    (place / "projector.json").write_text(json.dumps({**manifest, "config": {**manifest["config"], "kind": "flatten"}}))
    with pytest.raises(ArtifactError, match="does not have the shapes it says"):
        load_projector(place)


def test_attentions_that_are_not_there(source: FrozenLM, tokenizer: PreTrainedTokenizerFast):
    pair = FrozenLM.from_model(tiny_seq2seq("t5"), with_end(tokenizer), name="pair")
    prompt = prompt_of(source, "prefix")
    with pytest.raises(PromptMismatchError, match="has keys and values for 'self' attention"):
        PromptSpace.of(prompt).on(pair.geometry)
    theirs = prompt_of(pair, "prefix", sites=("encoder",))
    small = FrozenLM.from_model(tiny_seq2seq("t5", seed=1), with_end(tokenizer))
    projected = projected_prompt(projector_for(theirs, small, "linear"), theirs)
    assert {key.site for key in projected.layers or ()} == {"encoder"}
