"""Packed attention on CUDA: one FlexAttention call per layer, whose block mask says who sees whom.

Keys and values are laid out once per batch, ``[prompts | packed text]``, and shared by all rows; blocks of the score
matrix in which nobody sees anybody are never computed. The equal of :mod:`softprompts.models.kernels` where that one's
CPU kernels do not run. (Dong et al. 2024, FlexAttention; the packing mask is theirs, section 3.)

Shape letters: M packed tokens, A attention heads, N KV heads, H head size, P prompt columns of all prompts, C = P + M.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from softprompts.models.packing import Packing

__all__ = ["flex_packed_attention", "sees"]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it is compiled by itself
def flex_packed_attention(
    query_MAH: Tensor,
    key_MNH: Tensor,
    value_MNH: Tensor,
    packing: Packing,
    prefixes: Sequence[tuple[Tensor, Tensor] | None],
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """What :func:`softprompts.models.kernels.packed_attention` computes, with the same arguments."""
    fronts = [prefix for prefix in prefixes if prefix is not None]
    lengths = tuple(0 if prefix is None else prefix[0].shape[1] for prefix in prefixes)
    key_1NCH = torch.cat([*(keys for keys, _ in fronts), key_MNH.transpose(0, 1)], dim=1)[None]
    value_1NCH = torch.cat([*(values for _, values in fronts), value_MNH.transpose(0, 1)], dim=1)[None]
    query_1AMH = query_MAH.transpose(0, 1)[None]
    place = (lengths, window)
    mask = packing.block_masks.get(place)
    if mask is None:
        mask = packing.block_masks[place] = _block_mask(packing, lengths, window, query_MAH.device)
    attention: Callable[..., Any] = flex_attention
    if query_MAH.is_cuda:
        attention = _compiled()
    grouped = query_MAH.shape[1] != key_MNH.shape[1]
    out_1AMH: Tensor = attention(query_1AMH, key_1NCH, value_1NCH, block_mask=mask, scale=scale, enable_gqa=grouped)
    return out_1AMH[0].transpose(0, 1)


def sees(packing: Packing, lengths: Sequence[int], window: int | None, device: torch.device) -> Callable[..., Tensor]:
    """Make the rule that FlexAttention asks: whether packed token ``query`` attends to column ``column``.

    Args:
        packing: Rows and prompts.
        lengths: Columns in front of the text that hold each prompt in use; 0 for an embedded one.
        window: Text tokens that a text token looks back, itself included.
        device: Where the rule is asked.
    """
    front = sum(lengths)
    prompt_of_column = torch.tensor([p for p, length in enumerate(lengths) for _ in range(length)] or [-1])
    row_of_token = torch.empty(packing.tokens, dtype=torch.long)
    place_in_row = torch.empty(packing.tokens, dtype=torch.long)
    rows = 0
    tokens_S, pad_S = packing.slots.tokens_S.cpu(), packing.slots.pad_S1[:, 0].cpu()
    for block in packing.slots.blocks:
        inside = block.slots
        real = pad_S[inside] == 0
        row_of_token[tokens_S[inside][real]] = rows + torch.arange(block.rows).repeat_interleave(block.longest)[real]
        place_in_row[tokens_S[inside][real]] = torch.arange(block.longest).repeat(block.rows)[real]
        rows += block.rows
    prompt_of_token = torch.full((packing.tokens,), -2)
    embedded_prompt = torch.full((packing.tokens,), -3)
    for span in packing.spans:
        prompt_of_token[span.start : span.end] = span.prompt
        if span.embedded is not None:
            embedded_prompt[slice(*span.embedded)] = span.prompt
    tables = (prompt_of_column, row_of_token, place_in_row, prompt_of_token, embedded_prompt)
    of_column, of_row, place, of_token, of_embedded = (table.to(device) for table in tables)
    reach = packing.tokens if window is None else window

    def rule(_batch: Tensor, _head: Tensor, query: Tensor, column: Tensor) -> Tensor:
        token = (column - front).clamp(min=0)
        in_front = (column < front) & (of_column[column.clamp(max=len(of_column) - 1)] == of_token[query])
        back = place[query] - place[token]
        in_text = (of_row[query] == of_row[token]) & (back >= 0) & (back < reach)
        in_embedded = of_embedded[token] == of_token[query]
        return in_front | ((column >= front) & (in_text | in_embedded))

    return rule


def _block_mask(packing: Packing, lengths: tuple[int, ...], window: int | None, device: torch.device) -> BlockMask:
    rule = sees(packing, lengths, window, device)
    return create_block_mask(rule, None, None, packing.tokens, sum(lengths) + packing.tokens, device=device)


@cache
def _compiled() -> Callable[..., Any]:
    # Without compilation FlexAttention computes all scores, also those that nobody needs.
    return torch.compile(flex_attention, dynamic=True)
