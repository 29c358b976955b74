"""Two tiny Llamas of different width and depth with one vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from conftest import SIZES
from softprompts.models import FrozenLM


@pytest.fixture(scope="session")
def llama(tokenizer: PreTrainedTokenizerFast) -> Callable[..., FrozenLM]:
    """``llama(width, layers)``: a frozen random model, made once per session; never change it."""
    made: dict[tuple[int, int], FrozenLM] = {}

    def make(width: int = 32, layers: int = 3) -> FrozenLM:
        if (width, layers) not in made:
            sizes = {**SIZES, "hidden_size": width, "num_hidden_layers": layers, "num_key_value_heads": 2}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(width + layers)
                model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.ndim > 1:
                            parameter.normal_(0.0, 0.15)
            made[width, layers] = FrozenLM.from_model(model.eval(), tokenizer, name=f"llama-{width}x{layers}")
        return made[width, layers]

    return make


@pytest.fixture
def source(llama: Callable[..., FrozenLM]) -> FrozenLM:
    """The model that prompts come from."""
    return llama(32, 3)


@pytest.fixture
def target(llama: Callable[..., FrozenLM]) -> FrozenLM:
    """The model that gets prompts: wider and deeper."""
    return llama(48, 5)
