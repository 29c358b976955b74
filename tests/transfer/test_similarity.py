"""Measures on a prompt's own numbers: each equals its definition, written out pair by pair."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from softprompts.errors import ConfigError, LengthError, PromptMismatchError
from softprompts.prompts import SoftPrompt, prompt_from_table
from softprompts.prompts.prefix import PrefixPrompt
from softprompts.prompts.reparam import Mlp
from softprompts.transfer.similarity import MEASURES, spaces
from softprompts.types import Geometry, KeyValueSite, LayerKey

SITES = (
    KeyValueSite(LayerKey("self", 0), kv_heads=2, key_size=4, value_size=4),
    KeyValueSite(LayerKey("self", 1), kv_heads=1, key_size=8, value_size=6),
)
GEOMETRY = Geometry(family="llama", width=12, vocab_size=50, max_positions=64, sites=SITES)


def make(kind: str, length: int = 5, seed: int = 0, scale: float = 1.0) -> SoftPrompt:
    width = GEOMETRY.width if kind == "embedding" else GEOMETRY.prefix_width
    table_PW = scale * torch.randn(length, width, generator=torch.Generator().manual_seed(seed))
    return prompt_from_table(kind, GEOMETRY, table_PW)


def distance(one: Tensor, other: Tensor) -> float:
    return math.sqrt(sum((float(a) - float(b)) ** 2 for a, b in zip(one.flatten(), other.flatten(), strict=True)))


def cosine(one: Tensor, other: Tensor) -> float:
    product = sum(float(a) * float(b) for a, b in zip(one.flatten(), other.flatten(), strict=True))
    return product / (distance(one, 0 * one) * distance(other, 0 * other))


def plainly(measure: str, one: Tensor, other: Tensor) -> float:
    """The definition in Su et al. 2022, section 6.1."""
    pairs = list(itertools.product(one, other))
    if measure == "euclidean":
        return 1 / (1 + distance(one, other))
    if measure == "euclidean_tokens":
        return 1 / (1 + sum(distance(a, b) for a, b in pairs) / len(pairs))
    if measure == "cosine":
        return cosine(one, other)
    return sum(cosine(a, b) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("kind", ["embedding", "prefix"])
@pytest.mark.parametrize("measure", list(MEASURES))
def test_a_matrix_is_the_definition_of_every_pair(measure: str, kind: str):
    lengths = (4, 4, 4) if MEASURES.get(measure).needs_equal_lengths else (3, 5, 30)
    prompts = [make(kind, length, seed, scale=seed + 0.5) for seed, length in enumerate(lengths)]
    matrix_KK = MEASURES.get(measure).matrix(prompts)
    for row, column in itertools.product(range(3), repeat=2):
        one, other = spaces(prompts[row]), spaces(prompts[column])
        expected = [plainly(measure, one[name], other[name]) for name in one]
        assert float(matrix_KK[row, column]) == pytest.approx(sum(expected) / len(expected), abs=1e-6)
    assert torch.equal(matrix_KK, matrix_KK.T)
    assert MEASURES.get(measure)(prompts[0], prompts[2]) == pytest.approx(float(matrix_KK[0, 2]), abs=1e-12)


@pytest.mark.parametrize("measure", ["euclidean", "cosine"])
def test_a_copy_is_as_alike_as_can_be(measure: str):
    matrix_KK = MEASURES.get(measure).matrix([make("prefix", 30, scale=100.0), make("prefix", 30, scale=100.0)])
    assert torch.allclose(matrix_KK, torch.ones(2, 2, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("measure", ["euclidean_tokens", "cosine_tokens"])
def test_token_measures_do_not_see_the_order(measure: str):
    prompt = make("embedding", 6)
    turned = prompt_from_table("embedding", GEOMETRY, prompt.table_PW.flip(0))
    other = make("embedding", 4, seed=1)
    compare = MEASURES.get(measure)
    assert compare(prompt, other) == pytest.approx(compare(turned, other), abs=1e-12)


def test_spaces_of_a_prefix_are_its_keys_and_values_layer_by_layer():
    prompt = make("prefix", 3)
    cut = spaces(prompt)
    assert {name: tuple(table.shape) for name, table in cut.items()} == {
        "self.0.keys": (3, 8),
        "self.0.values": (3, 8),
        "self.1.keys": (3, 8),
        "self.1.values": (3, 6),
    }
    keys_NPH, _ = prompt().keys_values[LayerKey("self", 0)]
    assert torch.equal(cut["self.0.keys"][1].float(), keys_NPH[:, 1].flatten())


def test_one_layer_with_long_vectors_does_not_drown_the_others():
    one, other = make("prefix", 4), make("prefix", 4, seed=1)
    loud = [prompt.table_PW for prompt in (one, other)]
    for table in loud:
        table[:, :8] *= 1024.0  # the keys of layer 0
    long_keys = [prompt_from_table("prefix", GEOMETRY, table) for table in loud]
    compare = MEASURES.get("cosine")
    assert compare(*long_keys) == pytest.approx(compare(one, other), abs=1e-7)


def test_reparametrizations_are_folded_first():
    torch.manual_seed(0)
    prompt = PrefixPrompt(GEOMETRY, Mlp(4, 12, 8, GEOMETRY.prefix_width), 4)
    assert MEASURES.get("cosine")(prompt, prompt.fold()) == pytest.approx(1.0)


def test_zeros_have_no_direction():
    nothing = prompt_from_table("embedding", GEOMETRY, torch.zeros(5, 12))
    for measure in ("cosine", "cosine_tokens"):
        assert MEASURES.get(measure)(nothing, make("embedding")) == 0.0


@pytest.mark.parametrize("measure", ["euclidean", "cosine"])
def test_flat_measures_refuse_different_lengths(measure: str):
    with pytest.raises(LengthError, match=f"lengths 3, 5.*'{measure}_tokens'"):
        MEASURES.get(measure)(make("embedding", 3), make("embedding", 5))


def test_what_has_no_numbers_in_common_is_refused():
    compare = MEASURES.get("cosine_tokens")
    with pytest.raises(PromptMismatchError, match=r"embedding and prefix.*convert --fold"):
        compare(make("embedding"), make("prefix"))
    narrow = Geometry(family="llama", width=6, vocab_size=50, max_positions=64, sites=SITES)
    with pytest.raises(PromptMismatchError, match="width 6, prompt 0 has embeddings of width 12"):
        compare(make("embedding"), prompt_from_table("embedding", narrow, torch.ones(5, 6)))
    one_layer = prompt_from_table("prefix", GEOMETRY, torch.ones(5, 16), [LayerKey("self", 0)])
    with pytest.raises(PromptMismatchError, match="in 1 layers, prompt 0 has 30 numbers per position in 2 layers"):
        compare(make("prefix"), one_layer)


def test_an_unknown_measure_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'cosine_tokens'"):
        MEASURES.get("cosine_token")
