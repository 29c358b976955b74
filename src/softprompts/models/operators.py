"""Packed attention as an operator of torch, so that a compiled model holds it as one node and never breaks at it.

``torch.compile`` traces tensors; the layout of a batch (which rows, how long, behind which prompt) is handed over as
small integer tensors, so another layout is another input and no reason to compile again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softprompts.models.kernels import Layout, Shape, attention_backward, attention_forward
from softprompts.models.packing import Block, Packing, PromptSpan, Slots

__all__ = ["packed_attention_operator", "register_operators"]

_LAYOUT = "Tensor tokens, Tensor slots, Tensor pads, Tensor blocks, Tensor spans, int[] held, float scale, int window"
_FORWARD = "softprompts::packed_attention"
_BACKWARD = "softprompts::packed_attention_backward"
_registered: list[torch.library.Library] = []


def register_operators() -> None:
    """Make the operators known to torch; repeated calls change nothing."""
    if _registered:
        return
    library = torch.library.Library("softprompts", "DEF")
    library.define(f"packed_attention(Tensor q, Tensor k, Tensor v, Tensor[] prefixes, {_LAYOUT}) -> (Tensor, Tensor)")
    library.define(
        f"packed_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor[] prefixes, Tensor out, "
        f"Tensor lse, {_LAYOUT}) -> (Tensor, Tensor, Tensor, Tensor[])"
    )
    library.impl("packed_attention", _forward, "CPU")
    library.impl("packed_attention_backward", _backward, "CPU")
    torch.library.register_fake(_FORWARD, _forward_shapes, lib=library)
    torch.library.register_fake(_BACKWARD, _backward_shapes, lib=library)
    torch.library.register_autograd(_FORWARD, _gradient, setup_context=_remember, lib=library)
    _registered.append(library)


def packed_attention_operator(
    query_MAH: Tensor,
    key_MNH: Tensor,
    value_MNH: Tensor,
    packing: Packing,
    prefixes: Sequence[tuple[Tensor, Tensor] | None],
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """What :func:`softprompts.models.kernels.packed_attention` computes, as a node of a compiled graph."""
    slots = packing.slots
    out: Tensor = torch.ops.softprompts.packed_attention(
        query_MAH,
        key_MNH,
        value_MNH,
        [tensor for prefix in prefixes if prefix is not None for tensor in prefix],
        slots.tokens_S,
        slots.slot_M,
        slots.pad_S1,
        slots.blocks_X3,
        packing.spans_Y5,
        [int(prefix is not None) for prefix in prefixes] or [0],  # torch's autograd takes no empty list of numbers
        Shape.of(query_MAH, key_MNH, scale, window).scale,
        -1 if window is None else window,
    )[0]
    return out


def _layout(tokens: Tensor, slots: Tensor, pads: Tensor, blocks: Tensor, spans: Tensor, held: Sequence[int]) -> Layout:
    rows = tuple(Block(first, count, longest) for first, count, longest in blocks.tolist())
    prompts = tuple(
        PromptSpan(start, end, prompt, (first, last) if last > first else None)
        for start, end, prompt, first, last in spans.tolist()
        if last > first or held[prompt]
    )
    return Layout(Slots(rows, tokens, slots, pads, blocks), prompts)


def _shape(query: Tensor, key: Tensor, scale: float, window: int) -> Shape:
    return Shape.of(query, key, scale, None if window < 0 else window)


def _forward(q: Tensor, k: Tensor, v: Tensor, prefixes: list[Tensor], *layout: Any) -> tuple[Tensor, Tensor]:
    *tensors, scale, window = layout
    return attention_forward(_layout(*tensors), _shape(q, k, scale, window), q, k, v, prefixes)


def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, prefixes: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, prefixes: list[Tensor], out: Tensor, lse: Tensor, *layout: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    *tensors, scale, window = layout
    shape = _shape(q, k, scale, window)
    text, prompts = attention_backward(_layout(*tensors), shape, q, k, v, prefixes, out, lse, grad, through_text=True)
    return text[0], text[1], text[2], [part.contiguous() for part in prompts]


def _backward_shapes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, prefixes: list[Tensor], *_: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), [p.new_empty(p.shape) for p in prefixes]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, prefixes, *layout = inputs
    ctx.layout = layout[-3:]
    ctx.save_for_backward(q, k, v, *layout[:-3], *output, *prefixes)


def _gradient(ctx: Any, grad_out: Tensor, _grad_lse: Tensor) -> tuple[Any, ...]:
    q, k, v, *rest = ctx.saved_tensors
    layout, (out, lse), prefixes = rest[:5], rest[5:7], list(rest[7:])
    grad_q, grad_k, grad_v, grad_prefixes = torch.ops.softprompts.packed_attention_backward(
        grad_out.contiguous(), q, k, v, prefixes, out, lse, *layout, *ctx.layout
    )
    return grad_q, grad_k, grad_v, grad_prefixes, *[None] * 8
