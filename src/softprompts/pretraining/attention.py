"""Causal attention for training on CPUs: plain matrix products over blocks of queries, left to the compiler to fuse.

PyTorch's fused CPU kernel runs at a fraction of the speed of bf16 matrix products (measured on two EPYC cores with
AVX512-BF16, 16 rows of 512 tokens: 0.9 s of a 2.6 s step against 0.5 s for the blocks below). Same result up to
rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

__all__ = ["BLOCKED_CAUSAL", "blocked_causal_attention", "register_blocked_attention"]

BLOCKED_CAUSAL = "softprompts_blocked_causal"
_BLOCK = 128


def blocked_causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally to rows without padding.

    Args:
        module: The attention layer; says how many query heads share a KV head.
        query: ``[B, heads, T, H]``.
        key: ``[B, N, T, H]``.
        value: ``[B, N, T, H]``.
        attention_mask: Must be ``None``: causal, no padding.
        scaling: Factor of the scores; ``None`` means ``H ** -0.5``.
        dropout: Must be zero.

    Returns:
        ``[B, T, heads, H]`` and no weights.
    """
    assert attention_mask is None, "blocked attention is for rows without padding"
    assert dropout == 0.0, "blocked attention has no dropout"
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    query = query * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    length = query.shape[2]
    positions = torch.arange(length, device=query.device)
    outputs = []
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        scores = torch.matmul(query[:, :, start:end], key[:, :, :end].transpose(2, 3))
        allowed = positions[start:end, None] >= positions[None, :end]
        scores = scores.float().masked_fill(~allowed, float("-inf"))
        weights = torch.softmax(scores, dim=-1).to(value.dtype)
        outputs.append(torch.matmul(weights, value[:, :, :end]))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def register_blocked_attention() -> str:
    """Make the function known to transformers; return its name for ``attn_implementation``."""
    AttentionInterface.register(BLOCKED_CAUSAL, blocked_causal_attention)
    # No mask is built: the function is causal by itself, and rows have no padding.
    AttentionMaskInterface.register(BLOCKED_CAUSAL, lambda *_, **__: None)
    return BLOCKED_CAUSAL
