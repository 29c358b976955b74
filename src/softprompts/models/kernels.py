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

from softprompts.models.packing import Block, Packing, PromptSpan

__all__ = ["merge", "packed_attention"]


class _Shape(NamedTuple):
    """What every part of one call has in common."""

    scale: float
    window: int | None
    groups: int
    """Attention heads per KV head."""


def packed_attention(
    query_MAH: Tensor,
    key_MNH: Tensor,
    value_MNH: Tensor,
    packing: Packing,
    prefixes: list[tuple[Tensor, Tensor] | None],
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
    shape = _Shape(
        scale if scale is not None else query_MAH.shape[-1] ** -0.5, window, query_MAH.shape[1] // key_MNH.shape[1]
    )
    flat = [tensor for prefix in prefixes if prefix is not None for tensor in prefix]
    held = tuple(prefix is not None for prefix in prefixes)
    return cast(Tensor, _PackedAttention.apply(packing, shape, held, query_MAH, key_MNH, value_MNH, *flat))  # type: ignore[no-untyped-call]


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
        packing: Packing,
        shape: _Shape,
        held: tuple[bool, ...],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *prefixes: Tensor,
    ) -> Tensor:
        """Return ``[M, A, H]``."""
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        for block in packing.blocks:
            q, k, v = (_padded(tensor, block) for tensor in (query, key, value))
            k, v = _all_heads(k, shape), _all_heads(v, shape)
            part, part_lse = _flash(q, k, v, shape.scale, *_visibility(block, shape, q))
            out.index_copy_(0, block.real_tokens, _unpadded(part, block))
            lse.index_copy_(0, block.real_tokens, _unpadded(part_lse[..., None], block)[..., 0])
        for span, keys, values in _prompts(packing, held, key, value, prefixes):
            rows = slice(span.start, span.end)
            q = query[rows].transpose(0, 1)[None]
            k, v = _all_heads(keys[None], shape), _all_heads(values[None], shape)
            part, part_lse = _flash(q, k, v, shape.scale, False, None)
            out[rows], lse[rows] = merge(out[rows], lse[rows], part[0].transpose(0, 1), part_lse[0].transpose(0, 1))
        ctx.save_for_backward(query, key, value, out, lse, *prefixes)
        ctx.packing, ctx.shape, ctx.held = packing, shape, held
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Return the gradients of queries, keys, values and prefixes."""
        query, key, value, out, lse, *prefixes = ctx.saved_tensors
        grad_out = gradients[0].contiguous()
        packing, shape = ctx.packing, ctx.shape
        text_needs = any(ctx.needs_input_grad[3:6])
        grad_q = torch.empty_like(out)
        grad_k, grad_v = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (key, value))
        for block in packing.blocks if text_needs else ():
            q, k, v = (_padded(tensor, block) for tensor in (query, key, value))
            k, v = _all_heads(k, shape), _all_heads(v, shape)
            # Pads carry a gradient of zero, whatever else stands there.
            padded_grad = _padded(grad_out, block, clear=True)
            o, log_sum = _padded(out, block), _padded(lse[..., None], block)[..., 0]
            parts = _flash_backward(padded_grad, q, k, v, o, log_sum, shape.scale, *_visibility(block, shape, q))
            grad_q.index_copy_(0, block.real_tokens, _unpadded(parts[0], block))
            grad_k.index_copy_(0, block.real_tokens, _unpadded(_kv_heads(parts[1], shape), block))
            grad_v.index_copy_(0, block.real_tokens, _unpadded(_kv_heads(parts[2], shape), block))
        grads: list[Tensor] = []
        for span, keys, values in _prompts(packing, ctx.held, key, value, prefixes):
            rows = slice(span.start, span.end)
            q, o, g = (tensor[rows].transpose(0, 1)[None] for tensor in (query, out, grad_out))
            log_sum = lse[rows].transpose(0, 1)[None]
            k, v = _all_heads(keys[None], shape), _all_heads(values[None], shape)
            part_q, part_k, part_v = _flash_backward(g, q, k, v, o, log_sum, shape.scale, False, None)
            part_k, part_v = _kv_heads(part_k, shape)[0], _kv_heads(part_v, shape)[0]
            grad_q[rows] += part_q[0].transpose(0, 1)
            if span.embedded is not None:
                grad_k[slice(*span.embedded)] += part_k.transpose(0, 1)
                grad_v[slice(*span.embedded)] += part_v.transpose(0, 1)
            else:
                grads += [part_k, part_v]
        return None, None, None, grad_q, grad_k, grad_v, *grads


def _prompts(
    packing: Packing, held: tuple[bool, ...], key: Tensor, value: Tensor, prefixes: Sequence[Tensor]
) -> Iterator[tuple[PromptSpan, Tensor, Tensor]]:
    """Give every span with the keys and values ``[N, P, H]`` of its prompt; spans stand in the order of prompts."""
    given = iter(prefixes)
    for span in packing.spans:
        if span.embedded is not None:
            inside = slice(*span.embedded)
            yield span, key[inside].transpose(0, 1), value[inside].transpose(0, 1)
        elif held[span.prompt]:
            yield span, next(given), next(given)


def _padded(tensor_MAH: Tensor, block: Block, *, clear: bool = False) -> Tensor:
    """Bring the rows of a block side by side, ``[R, A, T, H]``; pads repeat a real token, or are zero if cleared."""
    shape = (block.rows, block.longest, *tensor_MAH.shape[1:])
    if clear:
        slots = tensor_MAH.new_zeros(block.rows * block.longest, *tensor_MAH.shape[1:])
        slots.index_copy_(0, block.real_slots, tensor_MAH.index_select(0, block.real_tokens))
    else:
        slots = tensor_MAH.index_select(0, block.tokens)
    return slots.view(shape).transpose(1, 2)


def _unpadded(padded_RATH: Tensor, block: Block) -> Tensor:
    """Give the real tokens of a block, ``[m, A, H]``, in the order of ``block.real_tokens``."""
    return padded_RATH.transpose(1, 2).flatten(0, 1).index_select(0, block.real_slots)


def _all_heads(states_RNTH: Tensor, shape: _Shape) -> Tensor:
    return states_RNTH if shape.groups == 1 else states_RNTH.repeat_interleave(shape.groups, dim=1)


def _kv_heads(gradient_RATH: Tensor, shape: _Shape) -> Tensor:
    return gradient_RATH if shape.groups == 1 else gradient_RATH.unflatten(1, (-1, shape.groups)).sum(dim=2)


def _visibility(block: Block, shape: _Shape, like: Tensor) -> tuple[bool, Tensor | None]:
    """Causal flag and mask of a block's attention to itself; pads stand behind the text, so causality hides them."""
    if shape.window is None or block.longest <= shape.window:
        return True, None
    column_T = torch.arange(block.longest, device=like.device)
    back_TT = column_T[:, None] - column_T[None, :]
    hidden_TT = (back_TT < 0) | (back_TT >= shape.window)
    return False, like.new_zeros(back_TT.shape).masked_fill_(hidden_TT, -torch.inf)[None, None]


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )
    return result


def _flash_backward(
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
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
    )
    return result
