"""What is known of families beyond what a probe shows. The fewer lines here, the better."""

from __future__ import annotations

from typing import Any

__all__ = ["REFUSED_FAMILIES", "TESTED_FAMILIES", "own_windows"]

TESTED_FAMILIES = ("gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "opt", "phi", "qwen3")
"""Families whose every contract is in the test matrix. Others are probed and checked against their own text at load."""

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
