"""Encoder-decoders under everyday switches: integer weights, bfloat16, recomputed activations, compiled."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from conftest import byte_tokenizer
from seq2seq_contracts import batch_of, ids_of, random_prefix
from softprompts.integrations.huggingface import attach
from softprompts.models import FrozenLM
from softprompts.models.quantization import QuantizedLinear, quantize_weights
from softprompts.prompted import PromptedLM
from softprompts.prompts import prompt_from_table
from zoo_seq2seq import tiny_seq2seq, with_end

SHAPES = ["bart", "t5_deep_decoder"]
KINDS = ["int8", "int4"]
LEAST_COSINE = {"int8": 0.95, "int4": 0.5}
"""Of the prompts' gradients with those of the whole weights: random weights leave no room for rounding."""
ROWS, TARGETS = [ids_of(n, 10 + n) for n in (4, 7, 3)], [ids_of(n, 20 + n) for n in (5, 2, 3)]


def frozen_from(model: PreTrainedModel) -> FrozenLM:
    return FrozenLM.from_model(model, with_end(byte_tokenizer()))


@cache
def whole(shape: str) -> FrozenLM:
    return frozen_from(tiny_seq2seq(shape))


@cache
def words_of(shape: str) -> Tensor:
    return whole(shape).embed(ids_of(2, 3))


def training(frozen: FrozenLM, shape: str) -> tuple[Tensor, Tensor]:
    """Losses of a batch with a prefix at all sites, an embedding prompt and none, and the prompts' gradients."""
    prompts = [random_prefix(frozen, 3, 1), prompt_from_table("embedding", frozen.geometry, words_of(shape))]
    with frozen.autocast():
        losses_M = PromptedLM(frozen, prompts).label_losses(batch_of(ROWS, TARGETS, [0, 1, -1])).losses_M
    losses_M.sum().backward()
    tables = [parameter for prompt in prompts for parameter in prompt.parameters()]
    assert {table.dtype for table in tables} == {torch.float32}
    return losses_M.detach(), torch.cat([table.grad.flatten() for table in tables if table.grad is not None])


def assert_the_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * float(two.abs().max()))


def assert_near(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], least_cosine: float) -> None:
    assert bool((got[1] != 0).all())
    assert float((got[0] - expected[0]).abs().max()) > 0
    assert float(functional.cosine_similarity(got[1], expected[1], dim=0)) > least_cosine


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_integer_weights_give_what_they_stand_for_recomputed_or_not(shape: str, kind: str) -> None:
    model, rounded = tiny_seq2seq(shape), tiny_seq2seq(shape)
    quantize_weights(model, kind)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    assert {name.split(".")[-1] for name in layers} >= ({"q", "wo"} if shape != "bart" else {"q_proj", "fc2"})
    with torch.no_grad():
        for name, layer in layers.items():
            rounded.get_submodule(name).weight.copy_(layer.weight)
    small, plain = frozen_from(model), frozen_from(rounded)
    got = training(small, shape)
    assert_the_same(got, training(plain, shape))
    assert_near(got, training(whole(shape), shape), LEAST_COSINE[kind])
    small.enable_gradient_checkpointing()
    assert_the_same(training(small, shape), got)


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_near_float32_recomputed_or_not(shape: str) -> None:
    """Weights in it, and float32 weights with products in it (what training chooses on fast processors)."""
    exact, cast, mixed = training(whole(shape), shape), frozen_from(tiny_seq2seq(shape).bfloat16()), whole(shape)
    mixed.training_dtype = torch.bfloat16
    try:
        for frozen in (cast, mixed):
            got = training(frozen, shape)
            assert_near(got, exact, 0.98)
            torch.testing.assert_close(got[0], exact[0], rtol=0.1, atol=0.1)
    finally:
        mixed.training_dtype = None
    got = training(cast, shape)
    cast.enable_gradient_checkpointing()
    recomputed = training(cast, shape)
    torch.testing.assert_close(recomputed[0], got[0], rtol=1e-2, atol=1e-2)
    assert float(functional.cosine_similarity(recomputed[1], got[1], dim=0)) > 0.999  # sums in another order


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_integer_weights_are_compiled_without_a_graph_break() -> None:
    base = tiny_seq2seq("t5_deep_decoder")
    quantize_weights(base, "int8")
    frozen = frozen_from(base)
    model = attach(frozen, random_prefix(frozen, 3, 1))
    batch = batch_of(ROWS, TARGETS, [0, 0, 0])
    inputs = {"input_ids": batch.ids_BT, "attention_mask": batch.mask_BT, "labels": batch.targets_BU}
    outputs = torch.compile(model, backend="eager", fullgraph=True)(**inputs)
    outputs.loss.backward()
    logits_MV, labels_M, _ = PromptedLM(frozen, [model.prompt]).label_logits(batch)
    torch.testing.assert_close(outputs.loss, cross_entropy(logits_MV, labels_M), rtol=1e-4, atol=1e-5)
    assert bool(model.prompt.parametrization.table_PW.grad.ne(0).any())
