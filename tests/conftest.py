"""Shared fixtures: a zoo of tiny random models, built from config, and a byte-level tokenizer for all of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from softprompts.models import FrozenLM

VOCABULARY = 260
"""256 bytes, end of text, padding, and two unused rows."""
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 257,
}


def _gpt2() -> PreTrainedModel:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES))


def _llama() -> PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2))


def _qwen3() -> PreTrainedModel:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16))


def _gemma3() -> PreTrainedModel:
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3TextConfig(
        **SIZES, num_key_value_heads=1, head_dim=16, sliding_window=96, layer_types=layers
    )
    return transformers.Gemma3ForCausalLM(config)


def _mistral() -> PreTrainedModel:
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=96)
    )


def _opt() -> PreTrainedModel:
    sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32))


def _gpt_neox() -> PreTrainedModel:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES))


def _phi() -> PreTrainedModel:
    return transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES))


ZOO: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "mistral": _mistral,
    "opt": _opt,
    "gpt_neox": _gpt_neox,
    "phi": _phi,
}
"""Families of the matrix; a new family is a new row here."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A real tokenizer with one token per byte, id 256 ``<|endoftext|>``, id 257 ``<|pad|>``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"})
    return fast


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A fresh tiny model with random weights, larger than the usual start so that prompts make a difference."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ZOO[family]()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.15)
    return model.eval()


def switches(model: PreTrainedModel) -> list[object]:
    """What a model must be left with as it was: modules, modes, dropouts, gradients, hooks, configs."""
    modules = [sorted(vars(module)) for module in model.modules()]
    modes = [(module.training, getattr(module, "p", None)) for module in model.modules()]
    dropouts = [getattr(module, "attention_dropout", None) for module in model.modules()]
    required = [parameter.requires_grad for parameter in model.parameters()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    return [modules, modes, dropouts, required, hooks, model.config.to_dict(), model.generation_config.to_dict()]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The byte-level tokenizer."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_frozen(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], FrozenLM]:
    """``tiny_frozen(family)``: a frozen tiny model, made once per session; never change it."""
    made: dict[str, FrozenLM] = {}

    def make(family: str) -> FrozenLM:
        if family not in made:
            made[family] = FrozenLM.from_model(tiny_model(family), tokenizer, name=f"tiny-{family}")
        return made[family]

    return make


@pytest.fixture(params=sorted(ZOO))
def frozen(request: pytest.FixtureRequest, tiny_frozen: Callable[[str], FrozenLM]) -> FrozenLM:
    """One frozen tiny model per family of the zoo."""
    return tiny_frozen(request.param)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models are fastest on one thread, and several test processes then share the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
