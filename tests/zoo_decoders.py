"""Tiny random decoder-only models, one row per shape: the families that people use and the corners of each.

A shape is a family with the options that change how keys, values, positions or windows work. Every model has the same
vocabulary, so that one byte-level tokenizer serves all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

__all__ = ["DECODERS", "SIZES", "VOCABULARY", "Shape"]

VOCABULARY = 260
"""256 bytes, end of text, padding, and two unused rows."""
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}
SIZES: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
}
GROUPED = {"num_key_value_heads": 2}
SMALL_WINDOW = 8
"""Shorter than the rows of the tests, so that a window does something."""
LARGE_WINDOW = 96
"""Longer than the rows of the tests: the model then sees its whole text."""
TWO_OF_THREE_SLIDE = ["sliding_attention", "full_attention", "sliding_attention"]


@dataclass(frozen=True)
class Shape:
    """One row: which classes of transformers, with which config."""

    classes: str
    """``"Llama"`` stands for ``LlamaConfig`` and ``LlamaForCausalLM``."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the config, beside :data:`SIZES` or instead of them."""
    model_class: str = ""
    """Where it is not ``<classes>ForCausalLM``."""
    config_class: str = ""
    """Where it is not ``<classes>Config``."""
    without: tuple[str, ...] = ()
    """Fields of :data:`SIZES` that the config does not know."""
    sizes: bool = True
    """Whether the config knows the fields of :data:`SIZES`; otherwise only those of tokens are given."""
    window: str | None = None
    """How prompts are to meet sliding windows: ``"text"`` lets them scroll by like text."""

    def build(self, seed: int = 0) -> PreTrainedModel:
        """Make the model with random weights, larger than the usual start so that prompts make a difference."""
        config_class = getattr(transformers, self.config_class or f"{self.classes}Config")
        model_class = getattr(transformers, self.model_class or f"{self.classes}ForCausalLM")
        fields = {**(SIZES if self.sizes else TOKENS), **self.options}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = config_class(**{name: value for name, value in fields.items() if name not in self.without})
            model: PreTrainedModel = model_class(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.normal_(0.0, 0.15)
        return model.eval()


def _gemma(window: int) -> dict[str, Any]:
    return {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": window, "layer_types": TWO_OF_THREE_SLIDE}


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
DECODERS: dict[str, Shape] = {
    "gpt2": Shape("GPT2", model_class="GPT2LMHeadModel"),
    "llama": Shape("Llama", GROUPED),
    "llama-multi-query": Shape("Llama", {"num_key_value_heads": 1, "attention_bias": True}),
    "qwen2": Shape("Qwen2", GROUPED),
    "qwen2-sliding": Shape(
        "Qwen2", {**GROUPED, "use_sliding_window": True, "sliding_window": SMALL_WINDOW, "max_window_layers": 1}
    ),
    "qwen3": Shape("Qwen3", {**GROUPED, "head_dim": 16}),
    "qwen2-moe": Shape(
        "Qwen2Moe",
        {
            **GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "qwen3-moe": Shape(
        "Qwen3Moe", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    ),
    "gemma": Shape("Gemma", {"num_key_value_heads": 1, "head_dim": 16}),
    "gemma2": Shape("Gemma2", _gemma(LARGE_WINDOW)),
    "gemma2-small-window": Shape("Gemma2", _gemma(SMALL_WINDOW)),
    "gemma3": Shape("Gemma3", _gemma(LARGE_WINDOW), config_class="Gemma3TextConfig"),
    "gemma3-small-window": Shape("Gemma3", _gemma(SMALL_WINDOW), config_class="Gemma3TextConfig"),
    "gemma4": Shape(
        "Gemma4",
        {
            **GROUPED,
            "num_hidden_layers": 6,
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": LARGE_WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        config_class="Gemma4TextConfig",
    ),
    "gemma4-plain": Shape(
        "Gemma4",
        {
            **GROUPED,
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": SMALL_WINDOW,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
        },
        config_class="Gemma4TextConfig",
    ),
    "mistral": Shape("Mistral", {**GROUPED, "sliding_window": SMALL_WINDOW}),
    "mistral-no-window": Shape("Mistral", {**GROUPED, "sliding_window": None}),
    "ministral": Shape("Ministral", {**GROUPED, "head_dim": 8, "sliding_window": SMALL_WINDOW}),
    "opt": Shape("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}, without=("intermediate_size",)),
    "opt-350m": Shape(
        "OPT",
        {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        without=("intermediate_size",),
    ),
    "gpt-neox": Shape("GPTNeoX"),
    "phi": Shape("Phi"),
    "phi3": Shape("Phi3", {**GROUPED, "sliding_window": None}),
    "falcon-multi-query": Shape(
        "Falcon", {"multi_query": True, "new_decoder_architecture": False, "parallel_attn": True}
    ),
    "falcon-new-decoder": Shape("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": Shape(
        "Falcon", {"alibi": True, "multi_query": False, "new_decoder_architecture": False, "bias": True}
    ),
    "bloom": Shape("Bloom", {"hidden_size": 32, "n_layer": 3, "n_head": 4}, sizes=False),
    "gpt-j": Shape("GPTJ", {"n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4, "n_positions": 256}, sizes=False),
    "gpt-neo": Shape(
        "GPTNeo",
        {
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": SMALL_WINDOW,
            "max_position_embeddings": 256,
        },
        sizes=False,
    ),
    "gpt-bigcode": Shape(
        "GPTBigCode", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "multi_query": True}, sizes=False
    ),
    "mpt": Shape("Mpt", {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 256}, sizes=False),
    "xglm": Shape(
        "XGLM",
        {"d_model": 32, "num_layers": 3, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 256},
        sizes=False,
    ),
    "codegen": Shape(
        "CodeGen", {"n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4, "n_positions": 256}, sizes=False
    ),
    "biogpt": Shape("BioGpt"),
    "mixtral": Shape("Mixtral", {**GROUPED, **EXPERTS}),
    "stablelm": Shape("StableLm", GROUPED),
    "starcoder2": Shape("Starcoder2", GROUPED),
    "olmo": Shape("Olmo", GROUPED),
    "olmo2": Shape("Olmo2", GROUPED),
    "olmo3": Shape("Olmo3", {**GROUPED, "sliding_window": SMALL_WINDOW, "layer_types": TWO_OF_THREE_SLIDE}),
    "granite": Shape("Granite", {**GROUPED, "logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    "cohere": Shape("Cohere", {**GROUPED, "logit_scale": 0.25}),
    "cohere2": Shape(
        "Cohere2",
        {**GROUPED, "head_dim": 8, "sliding_window": SMALL_WINDOW, "layer_types": TWO_OF_THREE_SLIDE},
    ),
    "gpt-oss": Shape(
        "GptOss",
        {**GROUPED, **EXPERTS, "head_dim": 8, "sliding_window": SMALL_WINDOW, "layer_types": TWO_OF_THREE_SLIDE},
    ),
    "smollm3": Shape("SmolLM3", {**GROUPED, "no_rope_layers": [1, 1, 0]}),
    "llama4": Shape(
        "Llama4",
        {
            **GROUPED,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "no_rope_layers": [1, 1, 0],
            "attention_chunk_size": 128,
        },
        config_class="Llama4TextConfig",
    ),
    "glm4": Shape("Glm4", {**GROUPED, "head_dim": 8}),
    "nemotron": Shape("Nemotron", GROUPED),
    "helium": Shape("Helium", {**GROUPED, "head_dim": 8}),
    "exaone4": Shape(
        "Exaone4",
        {**GROUPED, "sliding_window": SMALL_WINDOW, "layer_types": TWO_OF_THREE_SLIDE},
    ),
    "deepseek-v2": Shape("DeepseekV2", {**LATENT, "num_key_value_heads": 4}),
    "deepseek-v3": Shape("DeepseekV3", {**LATENT, "num_key_value_heads": 4}),
    "qwen3-next": Shape(
        "Qwen3Next",
        {
            **GROUPED,
            "num_hidden_layers": 4,
            "head_dim": 8,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "lfm2": Shape("Lfm2", {**GROUPED, "layer_types": ["conv", "full_attention", "conv"]}),
    "jamba": Shape(
        "Jamba",
        {
            **GROUPED,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    "mamba": Shape("Mamba", {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 8}, sizes=False),
    "mamba2": Shape(
        "Mamba2",
        {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "chunk_size": 16,
        },
        sizes=False,
    ),
    "rwkv": Shape("Rwkv", {"hidden_size": 32, "num_hidden_layers": 3, "context_length": 256}, sizes=False),
}
"""Shapes of the matrix; a new shape is a new row here."""

DECODERS |= {
    f"{name}, window text": replace(DECODERS[name], window="text")
    for name in ("mistral", "gemma3-small-window", "gpt-oss", "qwen2-sliding", "gemma4-plain")
}
