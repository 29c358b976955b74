"""What is known of families beyond what a probe shows. The fewer lines here, the better."""

from __future__ import annotations

__all__ = ["TESTED_FAMILIES"]

TESTED_FAMILIES = ("gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "opt", "phi", "qwen3")
"""Families whose every contract is in the test matrix. Others are probed and checked against their own text at load."""
