"""Attention written out, for what the fused kernels cannot do: capped scores (Gemma 2) and sinks (GPT-OSS).

Shape letters: B batch, A query heads, N KV heads, G query heads per KV head, T queries, S keys, H head size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["eager_attention", "needs_eager"]


def needs_eager(options: Mapping[str, object]) -> bool:
    """Whether a layer asks for something that ``sdpa`` refuses (``softcap``) or leaves out in silence (``s_aux``)."""
    return options.get("softcap") is not None or options.get("s_aux") is not None


def eager_attention(
    query_BATH: Tensor,
    key_BNSH: Tensor,
    value_BNSH: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks_A: Tensor | None = None,
    position_bias: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """Softmax attention in plain operations, scores and softmax in float32.

    Args:
        query_BATH: Queries.
        key_BNSH: Keys of all columns, the prompt's included.
        value_BNSH: Values; their head size may differ from the keys'.
        mask: True where attention is allowed, or a float mask that is added; ``[B or 1, A or 1, T, S]``.
        scaling: Factor of the scores; ``None`` is ``1 / sqrt(H)``.
        softcap: Scores are squeezed to ``softcap * tanh(score / softcap)`` (Gemma 2, section 2).
        sinks_A: Per head one score that takes part in the softmax and carries no value (GPT-OSS).
        position_bias: Added to the scores, ``[B or 1, A, T, S]``.
        causal: What ``mask=None`` stands for: causal, or everything visible.

    Returns:
        ``[B, T, A, H of the values]``, as the attention interface of transformers wants it.
    """
    B, A, T, _ = query_BATH.shape
    N, S = key_BNSH.shape[1], key_BNSH.shape[2]
    scale = scaling if scaling is not None else query_BATH.shape[-1] ** -0.5
    # query heads of one KV head lie side by side, so keys and values need not be repeated
    query_BNGH = query_BATH.reshape(B, N, A // N * T, -1)
    scores_BATS = (query_BNGH @ key_BNSH.transpose(2, 3)).reshape(B, A, T, S).float() * scale
    if softcap is not None:
        scores_BATS = torch.tanh(scores_BATS / softcap) * softcap
    if position_bias is not None:
        scores_BATS = scores_BATS + position_bias
    if mask is None and causal:
        mask = torch.ones(T, S, dtype=torch.bool, device=query_BATH.device).tril(S - T)
    if mask is not None and mask.dtype == torch.bool:
        # the lowest number and not -inf: a pad that sees nothing must not turn into NaN
        scores_BATS = scores_BATS.masked_fill(~mask, torch.finfo(torch.float32).min)
    elif mask is not None:
        scores_BATS = scores_BATS + mask
    if sinks_A is not None:
        sinks = sinks_A.float().reshape(1, A, 1, 1).expand(B, A, T, 1)
        weights_BATS = torch.cat([scores_BATS, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights_BATS = scores_BATS.softmax(dim=-1)
    weights = weights_BATS.to(value_BNSH.dtype).reshape(B, N, A // N * T, S)
    return (weights @ value_BNSH).reshape(B, A, T, -1).transpose(1, 2).contiguous()
