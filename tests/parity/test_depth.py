"""Prefixes on chosen layers of decoder-only models: alone, beside others, packed, padded and decoding."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from softprompts.config import PromptConfig
from softprompts.errors import ConfigError
from softprompts.models import FrozenLM
from softprompts.prompted import PromptedLM
from softprompts.prompts import SoftPrompt, build_prompt, prompt_from_table
from softprompts.types import Batch, LayerKey

FAMILIES = ["gpt2", "llama"]


def prefix(frozen: FrozenLM, layers: list[int], length: int, seed: int) -> SoftPrompt:
    keys = [LayerKey("self", layer) for layer in layers]
    width = sum(site.width for site in frozen.geometry.reached(keys))
    table = torch.randn(length, width, generator=torch.Generator().manual_seed(seed))
    return prompt_from_table("prefix", frozen.geometry, table, keys)


def batch_of(prompts: list[int]) -> Batch:
    lengths = [5 + number % 3 for number in range(len(prompts))]
    ids = torch.randint(0, 256, (len(prompts), max(lengths)), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    labels = torch.where(mask == 1, ids, -100)
    labels[:, 0] = -100
    return Batch(ids, mask, labels, torch.tensor(prompts))


def row_of(batch: Batch, row: int) -> Batch:
    assert batch.labels_BT is not None
    part = slice(row, row + 1)
    return Batch(batch.ids_BT[part], batch.mask_BT[part], batch.labels_BT[part], batch.prompt_of_row_B[part])


def close(got: Tensor, expected: Tensor) -> bool:
    return float((got - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batch_equals_its_rows(tiny_frozen: Callable[[str], FrozenLM], family: str, packing: bool) -> None:
    frozen = tiny_frozen(family)
    prompts = [prefix(frozen, [1], 4, 1), prefix(frozen, [0, 1, 2], 2, 2), prefix(frozen, [0, 2], 6, 4)]
    prompted = PromptedLM(frozen, prompts)
    prompted.packing = packing
    batch = batch_of([0, 1, -1, 2, 0, 2])
    with torch.no_grad():
        together = prompted.label_logits(batch).logits_MV
        prompted.packing = False
        alone = [prompted.label_logits(row_of(batch, row)).logits_MV for row in range(batch.rows)]
        bare = PromptedLM(frozen).label_logits(
            Batch(batch.ids_BT, batch.mask_BT, batch.labels_BT, torch.full((6,), -1))
        )
    assert close(together, torch.cat(alone))
    assert not close(together, bare.logits_MV)


def test_only_the_chosen_layer_sees_the_prefix(
    tiny_frozen: Callable[[str], FrozenLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against transformers' eager attention with keys and values put in front in that layer by hand."""
    frozen = tiny_frozen("gpt2")
    prompt = prefix(frozen, [1], 4, 1)
    batch = row_of(batch_of([0]), 0)
    with torch.no_grad():
        got = PromptedLM(frozen, [prompt]).label_logits(batch).logits_MV
        keys, values = (states[None] for states in prompt().keys_values[LayerKey("self", 1)])
    code = sys.modules[type(frozen.model).__module__]
    plain = code.eager_attention_forward

    def widened(module, query, key, value, mask, **kwargs):  # type: ignore[no-untyped-def]
        if module is frozen.model.transformer.h[1].attn:
            key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
            mask = torch.nn.functional.pad(mask, (4, 0))
        return plain(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(code, "eager_attention_forward", widened)
    former = frozen.model.config._attn_implementation
    frozen.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            positions = torch.arange(4, 4 + batch.ids_BT.shape[1])[None]  # GPT-2 counts the prefix, in all layers
            own = frozen.model(input_ids=batch.ids_BT, position_ids=positions).logits[0, :-1]
    finally:
        frozen.model.set_attn_implementation(former)
    assert close(got, own)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_equals_one_pass(tiny_frozen: Callable[[str], FrozenLM], family: str) -> None:
    frozen = tiny_frozen(family)
    prompted = PromptedLM(frozen, [prefix(frozen, [1], 4, 1), prefix(frozen, [0, 2], 6, 4)])
    ids = torch.randint(0, 256, (3, 8), generator=torch.Generator().manual_seed(5))
    whole = Batch(
        ids, torch.ones_like(ids), torch.cat([torch.full((3, 5), -100), ids[:, 5:]], 1), torch.tensor([0, 1, -1])
    )
    with torch.no_grad():
        expected = prompted.label_logits(whole).logits_MV.unflatten(0, (3, 3))
    logits_BV, state = prompted.start(Batch(ids[:, :5], torch.ones(3, 5).long(), None, whole.prompt_of_row_B))
    assert close(logits_BV, expected[:, 0])
    assert close(prompted.step(ids[:, 5], state), expected[:, 1])
    state.select(torch.tensor([1, 1, 0]))
    assert close(prompted.step(ids[[1, 1, 0], 6], state), expected[[1, 1, 0], 2])


def test_recipes_choose_layers(tiny_frozen: Callable[[str], FrozenLM]) -> None:
    frozen = tiny_frozen("llama")
    prompt = build_prompt(PromptConfig(kind="prefix", length=3, layers=(2, 0)), frozen, seed=0)
    everywhere = build_prompt(PromptConfig(kind="prefix", length=3), frozen, seed=0)
    assert prompt.layers == (LayerKey("self", 0), LayerKey("self", 2))
    assert prompt.stored_parameters == everywhere.stored_parameters * 2 // 3
    for layer, pair in prompt().keys_values.items():  # the same start as on all layers
        assert all(torch.equal(one, two) for one, two in zip(pair, everywhere().keys_values[layer], strict=True))
    again = prompt.fold()
    assert (again.layers, again.stored_parameters) == (prompt.layers, prompt.stored_parameters)
    with pytest.raises(ConfigError, match="from 0 to 2"):
        build_prompt(PromptConfig(kind="prefix", length=3, layers=(3,)), frozen, seed=0)
    with pytest.raises(ConfigError, match="decoder-only model has one site"):
        build_prompt(PromptConfig(kind="prefix", length=3, sites=("cross",)), frozen, seed=0)
