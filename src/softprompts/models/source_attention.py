"""Attention of rows whose input is not run again: a third part beside the row's own tokens and its prompt.

It is merged with the other two by log-sum-exp (:mod:`softprompts.models.kernels`), and its backward pass gives a
gradient to the queries alone.

Shape letters: M packed tokens, A attention heads, N KV heads, H head size, R rows of a block, T their tokens, S tokens
of their inputs, X slots of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from softprompts.models.kernels import (
    Layout,
    Shape,
    all_heads,
    attention_backward,
    attention_forward,
    flash,
    flash_backward,
    merge,
    seen_spans,
)
from softprompts.models.packing import Packing
from softprompts.types import LayerKey

__all__ = ["source_attention"]


@dataclass(frozen=True)
class _Part:
    """The rows of one block that stand behind inputs."""

    rows: tuple[int, ...]
    """Their numbers in the batch, -1 for an embedded prompt."""
    tokens_X: Tensor
    """Packed token in every slot of the block, X = R * T."""
    real_X: Tensor
    mask_R1TS: Tensor | None
    """Added to the scores, ``[R, 1, T or 1, S]``."""

    def unpacked(self, tensor_MAH: Tensor) -> Tensor:
        """The block's tokens of a packed tensor, ``[R, A, T, H]``."""
        inside = tensor_MAH.index_select(0, self.tokens_X)
        return inside.view(len(self.rows), -1, *inside.shape[1:]).transpose(1, 2)

    def packed(self, tensor_RATH: Tensor) -> Tensor:
        """What the block holds at real tokens, ``[tokens, A, H]``."""
        return tensor_RATH.transpose(1, 2).flatten(0, 1)[self.real_X]


def source_attention(
    query_MAH: Tensor,
    key_MNH: Tensor,
    value_MNH: Tensor,
    packing: Packing,
    prefixes: Sequence[tuple[Tensor, Tensor] | None],
    *,
    layer: LayerKey,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """What :func:`softprompts.models.kernels.packed_attention` computes, every row behind its held input.

    Args:
        query_MAH: Queries of the packed tokens.
        key_MNH: Their keys.
        value_MNH: Their values.
        packing: Where rows and prompts lie, and what is held.
        prefixes: Per prompt in use its keys and values in this layer.
        layer: Which layer.
        scale: Of the scores; ``None`` means ``H ** -0.5``.
        window: Text tokens that a text token looks back, itself included, those of its input among them.
    """
    shape = Shape.of(query_MAH, key_MNH, scale, window)
    layout = Layout(packing.slots, seen_spans(packing, prefixes))
    flat = [tensor for prefix in prefixes if prefix is not None for tensor in prefix]
    held = packing.held
    assert held is not None
    if window not in held.layouts:  # layers of one kind share it
        held.layouts[window] = _parts(packing, held.lengths, window, key_MNH)
    parts = [(part, *held.keys_values(part.rows, layer, key_MNH)) for part in held.layouts[window]]
    return cast(Tensor, _SourceAttention.apply(layout, shape, parts, query_MAH, key_MNH, value_MNH, *flat))  # type: ignore[no-untyped-call]


def _parts(packing: Packing, held: Sequence[int], window: int | None, like: Tensor) -> list[_Part]:
    """Find the blocks whose rows stand behind inputs, ``held`` tokens each."""
    slots = packing.slots
    embedded = packing.tokens - len(packing.index_M)
    row_of_M = [-1] * embedded + (packing.index_M // packing.packed_of_BT.shape[1]).tolist()
    parts = []
    for block in slots.blocks:
        tokens_X = slots.tokens_S[block.slots]
        rows = tuple(row_of_M[token] for token in tokens_X[:: block.longest].tolist())
        lengths = [held[row] if row >= 0 else 0 for row in rows]
        if any(lengths):
            real_X = slots.pad_S1[block.slots, 0] == 0
            parts.append(_Part(rows, tokens_X, real_X, _hidden(lengths, block.longest, window, like)))
    return parts


def _hidden(lengths: Sequence[int], longest: int, window: int | None, like: Tensor) -> Tensor | None:
    """Mask of inputs of different lengths, and of what lies behind a window; ``None`` where all is seen."""
    width = max(lengths)
    length_R = torch.tensor(lengths, device=like.device)[:, None, None]
    column_S = torch.arange(width, device=like.device)
    hidden_RTS = column_S >= length_R
    if window is not None and width + longest > window:
        place_RT1 = length_R + torch.arange(longest, device=like.device)[:, None]
        hidden_RTS = hidden_RTS | (place_RT1 - column_S >= window)
    elif min(lengths) == width:
        return None
    # the lowest number and not -inf: a row that sees nothing here must not turn into NaN before it is merged
    return like.new_zeros(hidden_RTS.shape).masked_fill_(hidden_RTS, torch.finfo(like.dtype).min / 2)[:, None]


class _SourceAttention(torch.autograd.Function):
    """See :func:`source_attention`."""

    @staticmethod
    def forward(
        ctx: Any,
        layout: Layout,
        shape: Shape,
        parts: list[tuple[_Part, Tensor, Tensor]],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *prefixes: Tensor,
    ) -> Tensor:
        """Return ``[M, A, H]``."""
        out, lse = attention_forward(layout, shape, query, key, value, prefixes)
        for part, keys, values in parts:
            k, v = all_heads(keys, shape), all_heads(values, shape)
            own, own_lse = flash(part.unpacked(query), k, v, shape.scale, False, part.mask_R1TS)
            inside = part.tokens_X[part.real_X]
            merged = merge(out[inside], lse[inside], part.packed(own), part.packed(own_lse[..., None])[..., 0])
            out[inside], lse[inside] = merged
        ctx.save_for_backward(query, key, value, out, lse, *prefixes)
        ctx.layout, ctx.shape, ctx.parts = layout, shape, parts
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Return the gradients of queries, keys, values and prefixes; those of inputs are of no use to anybody."""
        query, key, value, out, lse, *prefixes = ctx.saved_tensors
        grad, shape = gradients[0].contiguous(), ctx.shape
        through_text = any(ctx.needs_input_grad[3:6])
        text, prompts = attention_backward(
            ctx.layout, shape, query, key, value, prefixes, out, lse, grad, through_text=through_text
        )
        for part, keys, values in ctx.parts if text else ():
            k, v = all_heads(keys, shape), all_heads(values, shape)
            g, q, o = (part.unpacked(tensor) for tensor in (grad, query, out))
            log_sum = part.unpacked(lse[..., None])[..., 0]
            of_query = flash_backward(g, q, k, v, o, log_sum, shape.scale, False, part.mask_R1TS)[0]
            text[0].index_add_(0, part.tokens_X[part.real_X], part.packed(of_query))
        return None, None, None, *(text or (None, None, None)), *prompts
