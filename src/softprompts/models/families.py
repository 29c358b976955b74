"""What is known of families beyond what a probe shows. The fewer lines here, the better."""

from __future__ import annotations

from typing import Any

__all__ = ["REFUSED_FAMILIES", "TESTED_FAMILIES", "own_windows"]

# fmt: off
TESTED_FAMILIES = (
    "biogpt", "bloom", "codegen", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "exaone4", "falcon", "gemma",
    "gemma2", "gemma3_text", "gemma4_text", "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj",
    "granite", "helium", "jamba", "lfm2", "llama", "mamba", "mamba2", "ministral", "mistral", "mixtral", "mpt",
    "nemotron", "olmo", "olmo2", "olmo3", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "qwen3_next", "smollm3", "stablelm", "starcoder2", "xglm",
)
# fmt: on
"""Decoder-only families whose contracts are in the test matrix (docs/reference/families.md). Others are probed and
checked against their own text at load."""

REFUSED_FAMILIES = {
    "llama4_text": "it counts chunks and scales queries by column and not by position, which a short check cannot see",
}
"""Families that only go wrong on texts longer than the check at load, and why."""


def own_windows(config: Any, layers: int) -> list[int | None]:
    """Windows of layers whose attention cannot be reached: they apply their windows themselves and tell nobody."""
    kinds = getattr(config, "attention_layers", None)
    if kinds is not None and len(kinds) == layers:  # GPT-Neo
        return [int(config.window_size) if kind == "local" else None for kind in kinds]
    window = getattr(config, "sliding_window", None)
    return [int(window) if window else None] * layers
