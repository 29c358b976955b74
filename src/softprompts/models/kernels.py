"""Attention of packed rows behind shared prompts, exact, forward and backward.

A prompt's keys and values are the same for all of its rows, so nothing is copied per row: the queries of all rows of a
prompt attend to it in one call, every row attends to its own text in another, and the two results are merged by their
log-sum-exp (as in ring attention, Liu et al. 2023, section 3, and the merging of split attention in FlashDecoding).
The backward pass of flash attention only needs the merged output and the merged log-sum-exp to give the exact gradient
of either part (Dao et al. 2022, appendix B.2), so it is called once per part as well.

Shape letters: M packed tokens, A attention heads, N KV heads, H head size, P prompt length, R rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from softprompts.models.packing import Block, Packing, PromptSpan, Slots

__all__ = [
    "Layout",
    "Shape",
    "all_heads",
    "attention_backward",
    "attention_forward",
    "flash",
    "flash_backward",
    "merge",
    "packed_attention",
    "seen_spans",
]


class Layout(NamedTuple):
    """Which tokens attend to each other, and which to a prompt, in one layer."""

    slots: Slots
    spans: tuple[PromptSpan, ...]
    """Those whose prompt this layer sees, in the order of prompts."""


class Shape(NamedTuple):
    """What every part of one call has in common."""

    scale: float
    """Of the scores."""
    window: int | None
    groups: int
    """Attention heads per KV head."""

    @classmethod
    def of(cls, query_MAH: Tensor, key_MNH: Tensor, scale: float | None, window: int | None) -> Shape:
        """Read it off queries and keys."""
        scale = scale if scale is not None else query_MAH.shape[-1] ** -0.5
        return cls(scale, window, query_MAH.shape[1] // key_MNH.shape[1])


def packed_attention(
    query_MAH: Tensor,
    key_MNH: Tensor,
    value_MNH: Tensor,
    packing: Packing,
    prefixes: Sequence[tuple[Tensor, Tensor] | None],
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal attention of every packed row to itself and to its prompt.

    Args:
        query_MAH: Queries of the packed tokens.
        key_MNH: Their keys; embedded prompts included.
        value_MNH: Their values.
        packing: Where rows and prompts lie.
        prefixes: Per prompt in use its keys and values ``[N, P, H]`` in this layer, ``None`` for an embedded prompt
            and for one that this layer does not see.
        scale: Of the scores; ``None`` means ``H ** -0.5``.
        window: Text tokens that a text token looks back, itself included. A prompt is always seen.

    Returns:
        ``[M, A, H]``.
    """
    shape = Shape.of(query_MAH, key_MNH, scale, window)
    layout = Layout(packing.slots, seen_spans(packing, prefixes))
    flat = [tensor for prefix in prefixes if prefix is not None for tensor in prefix]
    return cast(Tensor, _PackedAttention.apply(layout, shape, query_MAH, key_MNH, value_MNH, *flat))  # type: ignore[no-untyped-call]


def seen_spans(packing: Packing, prefixes: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[PromptSpan, ...]:
    """The spans whose prompt is embedded or has keys and values in this layer."""
    return tuple(span for span in packing.spans if span.embedded is not None or prefixes[span.prompt] is not None)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from the attention over each.

    Args:
        out_a: ``[..., H]``, softmax-weighted values of the first set.
        lse_a: ``[...]``, log-sum-exp of its scores.
        out_b: The same of the second set.
        lse_b: The same.

    Returns:
        Output and log-sum-exp over both sets.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    first, second = torch.exp(lse_a - lse)[..., None], torch.exp(lse_b - lse)[..., None]
    return (out_a * first + out_b * second).to(out_a.dtype), lse


class _PackedAttention(torch.autograd.Function):
    """See :func:`packed_attention`."""

    @staticmethod
    def forward(
        ctx: Any,
        layout: Layout,
        shape: Shape,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *prefixes: Tensor,
    ) -> Tensor:
        """Return ``[M, A, H]``."""
        out, lse = attention_forward(layout, shape, query, key, value, prefixes)
        ctx.save_for_backward(query, key, value, out, lse, *prefixes)
        ctx.layout, ctx.shape = layout, shape
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Return the gradients of queries, keys, values and prefixes."""
        query, key, value, out, lse, *prefixes = ctx.saved_tensors
        # In the first layer behind a prefix the text itself has nothing to pass on; its gradients stay empty.
        through_text = any(ctx.needs_input_grad[2:5])
        text, prompts = attention_backward(
            ctx.layout, ctx.shape, query, key, value, prefixes, out, lse, gradients[0], through_text=through_text
        )
        return None, None, *(text or (None, None, None)), *prompts


def attention_forward(
    layout: Layout, shape: Shape, query: Tensor, key: Tensor, value: Tensor, prefixes: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Give the output ``[M, A, H]`` and the log-sum-exp of the scores ``[M, A]``."""
    slots = layout.slots
    q, k, v = (tensor.index_select(0, slots.tokens_S) for tensor in (query, key, value))
    k, v = all_heads(k, shape), all_heads(v, shape)
    parts = []
    for block in slots.blocks:
        rows = [_rows(tensor, block) for tensor in (q, k, v)]
        parts.append(flash(rows[0], rows[1], rows[2], shape.scale, *_visibility(block, shape, q)))
    out = _gathered([part for part, _ in parts], slots)
    lse = _gathered([part_lse[..., None] for _, part_lse in parts], slots)[..., 0]
    for span, keys, values in _prompts(layout, key, value, prefixes):
        inside = slice(span.start, span.end)
        q = query[inside].transpose(0, 1)[None]
        k, v = all_heads(keys[None], shape), all_heads(values[None], shape)
        part, part_lse = flash(q, k, v, shape.scale, False, None)
        out[inside], lse[inside] = merge(out[inside], lse[inside], part[0].transpose(0, 1), part_lse[0].transpose(0, 1))
    return out, lse


def attention_backward(
    layout: Layout,
    shape: Shape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefixes: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    *,
    through_text: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Give the gradients of queries, keys and values (none if not ``through_text``) and of the prefixes."""
    grad_out = grad_out.contiguous()
    text: list[Tensor] = []
    if through_text:
        text = _text_gradients(layout.slots, shape, query, key, value, out, lse, grad_out)
    prompts: list[Tensor] = []
    for span, keys, values in _prompts(layout, key, value, prefixes):
        rows = slice(span.start, span.end)
        q, o, g = (tensor[rows].transpose(0, 1)[None] for tensor in (query, out, grad_out))
        log_sum = lse[rows].transpose(0, 1)[None]
        k, v = all_heads(keys[None], shape), all_heads(values[None], shape)
        part_q, part_k, part_v = flash_backward(g, q, k, v, o, log_sum, shape.scale, False, None)
        part_k, part_v = _kv_heads(part_k, shape)[0], _kv_heads(part_v, shape)[0]
        if text:
            text[0][rows] += part_q[0].transpose(0, 1)
        if span.embedded is None:
            prompts += [part_k, part_v]
        elif text:
            text[1][slice(*span.embedded)] += part_k.transpose(0, 1)
            text[2][slice(*span.embedded)] += part_v.transpose(0, 1)
    return text, prompts


def _prompts(
    layout: Layout, key: Tensor, value: Tensor, prefixes: Sequence[Tensor]
) -> Iterator[tuple[PromptSpan, Tensor, Tensor]]:
    """Give every span with the keys and values ``[N, P, H]`` of its prompt."""
    given = iter(prefixes)
    for span in layout.spans:
        if span.embedded is not None:
            inside = slice(*span.embedded)
            yield span, key[inside].transpose(0, 1), value[inside].transpose(0, 1)
        else:
            yield span, next(given), next(given)


def _text_gradients(
    slots: Slots,
    shape: Shape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
) -> list[Tensor]:
    """Gradients of queries, keys and values through every row's attention to itself."""
    tokens_S = slots.tokens_S
    q, k, v, o, g = (tensor.index_select(0, tokens_S) for tensor in (query, key, value, out, grad_out))
    # A pad's weights are exp(score - infinity) = 0, so whatever stands there gives no gradient to anything.
    log_sum = lse.index_select(0, tokens_S) + slots.pad_S1
    k, v = all_heads(k, shape), all_heads(v, shape)
    parts = []
    for block in slots.blocks:
        rows = [_rows(tensor, block) for tensor in (g, q, k, v, o, log_sum[..., None])]
        causal, mask = _visibility(block, shape, q)
        parts.append(
            flash_backward(rows[0], rows[1], rows[2], rows[3], rows[4], rows[5][..., 0], shape.scale, causal, mask)
        )
    grad_q, grad_k, grad_v = (_gathered([part[number] for part in parts], slots) for number in range(3))
    return [grad_q, _kv_heads(grad_k, shape), _kv_heads(grad_v, shape)]


def _rows(tensor_SAH: Tensor, block: Block) -> Tensor:
    """The rows of a block, ``[R, A, T, H]``."""
    inside = tensor_SAH[block.slots]
    return inside.view(block.rows, block.longest, *inside.shape[1:]).transpose(1, 2)


def _gathered(parts_RATH: Sequence[Tensor], slots: Slots) -> Tensor:
    """What the blocks hold for the packed tokens, ``[M, A, H]``."""
    flat = [part.transpose(1, 2).flatten(0, 1) for part in parts_RATH]
    return (flat[0] if len(flat) == 1 else torch.cat(flat)).index_select(0, slots.slot_M)


def all_heads(states_XNH: Tensor, shape: Shape) -> Tensor:
    """Repeat KV heads for the attention heads that share them, along the second dimension."""
    return states_XNH if shape.groups == 1 else states_XNH.repeat_interleave(shape.groups, dim=1)


def _kv_heads(gradient_XAH: Tensor, shape: Shape) -> Tensor:
    return gradient_XAH if shape.groups == 1 else gradient_XAH.unflatten(1, (-1, shape.groups)).sum(dim=2)


def _visibility(block: Block, shape: Shape, like: Tensor) -> tuple[bool, Tensor | None]:
    """Causal flag and mask of a block's attention to itself; pads stand behind the text, so causality hides them."""
    if shape.window is None or block.longest <= shape.window:
        return True, None
    column_T = torch.arange(block.longest, device=like.device)
    back_TT = column_T[:, None] - column_T[None, :]
    hidden_TT = (back_TT < 0) | (back_TT >= shape.window)
    return False, like.new_zeros(back_TT.shape).masked_fill_(hidden_TT, -torch.inf)[None, None]


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention ``[R, A, T, H]`` and the log-sum-exp of its scores ``[R, A, T]``."""
    result: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )
    return result


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, given the output and the log-sum-exp over all parts."""
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
    )
    return result
