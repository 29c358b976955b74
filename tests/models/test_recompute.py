"""Recomputed activations are those that were computed: no noise of a router comes in, or the model is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import byte_tokenizer
from softprompts.errors import UnsupportedModelError
from softprompts.models import FrozenLM
from softprompts.prompted import PromptedLM
from softprompts.prompts import prompt_from_table
from softprompts.types import Batch
from zoo_decoders import Shape

EXPERTS = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}


def frozen_with(classes: str, options: Mapping[str, Any]) -> FrozenLM:
    return FrozenLM.from_model(Shape(classes, options).build(), byte_tokenizer(), name=classes)


def gradient(frozen: FrozenLM) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 256, (3, 9), generator=torch.Generator().manual_seed(3))
    batch = Batch(ids, torch.ones_like(ids), ids.clone(), torch.zeros(3, dtype=torch.long))
    assert batch.labels_BT is not None
    batch.labels_BT[:, 0] = -100
    prompt = prompt_from_table("embedding", frozen.geometry, frozen.embed(range(4)))
    losses_M = PromptedLM(frozen, [prompt]).label_losses(batch).losses_M
    losses_M.sum().backward()
    (grad,) = [parameter.grad for parameter in prompt.parameters()]
    return losses_M.detach(), grad


def test_noise_of_a_router_stays_out_of_recomputed_activations() -> None:
    frozen = frozen_with("Mixtral", {**EXPERTS, "router_jitter_noise": 0.3})
    plain = gradient(frozen)
    frozen.enable_gradient_checkpointing()
    for one, two in zip(gradient(frozen), plain, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    # the check can fail: with its noise back, the same model computes something else
    for module in frozen.model.modules():
        if hasattr(module, "jitter_noise"):
            module.jitter_noise = 0.3
    assert float((gradient(frozen)[0] - plain[0]).abs().max()) > 1e-3


def test_a_model_that_draws_its_experts_is_refused_and_stays_as_it_was() -> None:
    frozen = frozen_with("Phimoe", {**EXPERTS, "router_jitter_noise": 0.01, "input_jitter_noise": 0.0})
    plain, state = gradient(frozen), torch.get_rng_state()
    with pytest.raises(UnsupportedModelError, match="'phimoe' computes something else in training mode"):
        frozen.enable_gradient_checkpointing()
    assert torch.equal(torch.get_rng_state(), state)
    assert not frozen.gradient_checkpointing
    assert not frozen.model.training
    assert torch.equal(gradient(frozen)[0], plain[0])
