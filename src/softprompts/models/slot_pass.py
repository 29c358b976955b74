"""One forward pass over rows in slots: which tokens, which rows run together, and their attention.

Shape letters: M packed tokens, R rows of a group, T tokens per row of a group, S columns, N KV heads, A attention
heads, H head size, P prompt length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from softprompts.models.eager import eager_attention, needs_eager
from softprompts.models.slots import Bank, SlotCache
from softprompts.types import LayerKey

__all__ = ["SlotPass", "Span"]

_SHORTEST_SHARE = 0.6
"""Pieces of inputs shorter than this share of the longest of their group get a group of their own."""


class Span(NamedTuple):
    """Tokens of one row that are computed in one pass."""

    row: int
    start: int
    """Column of the first of them."""
    length: int


@dataclass
class _Group:
    """Rows of one bank whose attention is one call of a kernel."""

    bank: Bank
    rows: slice | Tensor
    tokens: int
    """T."""
    first: int
    count: int
    """Packed tokens that belong to it lie side by side from ``first``."""
    query_X: Tensor | None
    """Packed token of every query; ``None``: they are in order."""
    kept_M: Tensor | None
    """Which results belong to packed tokens; ``None``: all of them."""
    end_RT: Tensor
    """Columns up to and including each query's own."""
    prompts: list[tuple[int, frozenset[LayerKey]]]
    longest: int
    """S."""
    even: bool
    """Whether every query sees all S columns, but for windows and prompts that do not reach a layer."""
    masks: dict[tuple[int | None, tuple[int, ...] | None], Tensor | None] = field(default_factory=dict)


class SlotPass:
    """One forward pass over tokens of rows in slots.

    Args:
        cache: Where the rows lie; every slot has room for its span.
        spans: What is computed.

    Attributes:
        order: Indices of the spans in the order in which their tokens are packed.
        column_M: Column, and so position, of every packed token.
    """

    def __init__(self, cache: SlotCache, spans: Sequence[Span]) -> None:
        self._cache = cache
        place = [cache.place(span.row) for span in spans]
        self.order = sorted(range(len(spans)), key=lambda i: (spans[i].length > 1, place[i], -spans[i].length))
        self._places = [place[i] for i in self.order]
        self._spans = [spans[i] for i in self.order]
        device = cache.device
        columns: list[int] = []
        writes: dict[int, tuple[list[int], list[int], list[int]]] = {}
        for span, (bank, index) in zip(self._spans, self._places, strict=True):
            tokens, rows, places = writes.setdefault(bank, ([], [], []))
            inside = range(span.start, span.start + span.length)
            tokens.extend(range(len(columns), len(columns) + span.length))
            rows.extend([index] * span.length)
            places.extend(inside)
            columns.extend(inside)
            cache.write(span.row, span.start + span.length)
        self.column_M = torch.tensor(columns, device=device)
        self._writes = [
            (
                cache.bank(bank),
                None if len(tokens) == len(columns) else torch.tensor(tokens, device=device),
                torch.tensor(rows, device=device),
                torch.tensor(places, device=device),
            )
            for bank, (tokens, rows, places) in writes.items()
        ]
        self._groups = self._grouped()

    def attend(
        self,
        layer: LayerKey,
        query_1AMH: Tensor,
        key_1NMH: Tensor,
        value_1NMH: Tensor,
        options: Mapping[str, Any],
    ) -> Tensor:
        """Write the tokens' keys and values, and attend to all that their rows hold.

        Args:
            layer: Where.
            query_1AMH: Of the packed tokens.
            key_1NMH: Theirs.
            value_1NMH: Theirs.
            options: What the model hands to its attention: scale, window, cap of the scores, sinks.

        Returns:
            ``[1, M, A, H]``.
        """
        if options.get("position_bias") is not None:
            raise ValueError("scores with a bias are not computed in slots")
        dtype = self._cache.dtype
        query_MAH, key_MNH, value_MNH = (
            tensor[0].transpose(0, 1).to(dtype) for tensor in (query_1AMH, key_1NMH, value_1NMH)
        )
        for bank, tokens_M, row_M, column_M in self._writes:
            keys, values = (key_MNH, value_MNH) if tokens_M is None else (key_MNH[tokens_M], value_MNH[tokens_M])
            bank.keys[layer][row_M, :, column_M] = keys
            bank.values[layer][row_M, :, column_M] = values
        parts = [self._attend(group, layer, query_MAH, options) for group in self._groups]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None].to(query_1AMH.dtype)

    def _attend(self, group: _Group, layer: LayerKey, query_MAH: Tensor, options: Mapping[str, Any]) -> Tensor:
        """Results of the group's packed tokens, ``[M, A, H]``."""
        keys_RNSH = group.bank.keys[layer][group.rows, :, : group.longest]
        values_RNSH = group.bank.values[layer][group.rows, :, : group.longest]
        query = (
            query_MAH[group.first : group.first + group.count] if group.query_X is None else query_MAH[group.query_X]
        )
        R, T, A, N = len(keys_RNSH), group.tokens, query_MAH.shape[1], keys_RNSH.shape[1]
        query_RATH = query.unflatten(0, (R, T)).transpose(1, 2)
        window, scale = options.get("sliding_window"), options.get("scaling")
        scale = float(scale) if isinstance(scale, (int, float)) else None
        mask = self._mask(group, layer, window if isinstance(window, int) else None)
        if needs_eager(options):
            plain = eager_attention(
                query_RATH,
                keys_RNSH,
                values_RNSH,
                mask,
                scaling=scale,
                softcap=options.get("softcap"),
                sinks_A=options.get("s_aux"),
                causal=False,
            )
            return _kept(group, plain.flatten(0, 1))
        # Queries of heads that share keys and values stand behind each other, as if they were more tokens.
        shared_RNXH = query_RATH.unflatten(1, (N, A // N)).flatten(2, 3)
        if mask is not None and A != N:
            mask = mask.repeat(1, 1, A // N, 1) if T > 1 else mask
        out: Tensor = scaled_dot_product_attention(shared_RNXH, keys_RNSH, values_RNSH, attn_mask=mask, scale=scale)
        return _kept(group, out.unflatten(2, (A // N, T)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1))

    def _mask(self, group: _Group, layer: LayerKey, window: int | None) -> Tensor | None:
        """What is added to the scores, ``[R, 1, T, S]``, or ``None``; made once per pass for all layers that agree."""
        reached = [layer in layers or not P for P, layers in group.prompts]
        hidden = (
            None
            if all(reached)
            else tuple(0 if sees else P for sees, (P, _) in zip(reached, group.prompts, strict=True))
        )
        window = window if window is not None and group.longest > window else None
        place = (window, hidden)
        if place not in group.masks:
            group.masks[place] = self._new_mask(group, window, hidden)
        return group.masks[place]

    def _new_mask(self, group: _Group, window: int | None, hidden: tuple[int, ...] | None) -> Tensor | None:
        if group.even and window is None and hidden is None:
            return None
        device = group.end_RT.device
        column_S = torch.arange(group.longest, device=device)
        sees_RTS = column_S < group.end_RT[:, :, None]
        if window is not None:
            near_RTS = column_S >= group.end_RT[:, :, None] - window
            if not self._cache.geometry.prompt_scrolls:
                prompt_R = torch.tensor([P for P, _ in group.prompts], device=device)
                near_RTS = near_RTS | (column_S < prompt_R[:, None, None])
            sees_RTS = sees_RTS & near_RTS
        if hidden is not None:
            sees_RTS = sees_RTS & (column_S >= torch.tensor(hidden, device=device)[:, None, None])
        blank = torch.zeros(sees_RTS.shape, dtype=self._cache.dtype, device=device)
        return blank.masked_fill_(~sees_RTS, -torch.inf)[:, None]

    # -- which rows run together -------------------------------------------------------------------------------------

    def _grouped(self) -> list[_Group]:
        """Next tokens of a bank's rows are one group, with rows that wait; pieces of inputs are grouped by length."""
        groups: list[_Group] = []
        first = at = 0
        while at < len(self._spans):
            bank, longest = self._places[at].columns, self._spans[at].length
            until = at + 1
            while until < len(self._spans) and self._belongs(until, bank, longest):
                until += 1
            groups.append(self._group(range(at, until), first, longest))
            first += groups[-1].count
            at = until
        return groups

    def _belongs(self, number: int, bank: int, longest: int) -> bool:
        length = self._spans[number].length
        if self._places[number].columns != bank or (length > 1) != (longest > 1):
            return False
        return length <= longest and length >= _SHORTEST_SHARE * longest

    def _group(self, members: range, first: int, T: int) -> _Group:
        """One group of spans; the last of them may be shorter than ``T``."""
        cache, device = self._cache, self._cache.device
        spans = [self._spans[number] for number in members]
        bank = cache.bank(self._places[members.start].columns)
        index = [self._places[number].number for number in members]
        if T == 1:  # all slots of the bank, as they lie there
            rows, present = list(range(index[-1] + 1)), set(index)
            of = dict(zip(index, range(len(spans)), strict=True))
            query = None if len(present) == len(rows) else [first + of.get(row, 0) for row in rows]
            kept = None if query is None else index
            end = [[cache.written(bank.rows[row])] for row in rows]
            rows_of: slice | Tensor = slice(0, len(rows))
        else:
            rows = index
            together = index == list(range(index[0], index[0] + len(index)))
            rows_of = slice(index[0], index[0] + len(index)) if together else torch.tensor(index, device=device)
            query, kept, at = None, None, first
            if any(span.length < T for span in spans):
                query, kept = [], []
                for number, span in enumerate(spans):
                    query += [at + min(t, span.length - 1) for t in range(T)]
                    kept += [number * T + t for t in range(span.length)]
                    at += span.length
            end = [[span.start + min(t + 1, span.length) for t in range(T)] for span in spans]
        longest = max(ends[-1] for ends in end)
        return _Group(
            bank,
            rows_of,
            T,
            first,
            sum(span.length for span in spans),
            None if query is None else torch.tensor(query, device=device),
            None if kept is None else torch.tensor(kept, device=device),
            torch.tensor(end, device=device),
            [cache.prompt(bank.rows[row]) for row in rows],
            longest,
            T == 1 and all(ends[0] == longest for ends in end),
        )


def _kept(group: _Group, out_XAH: Tensor) -> Tensor:
    """The results that belong to packed tokens."""
    return out_XAH if group.kept_M is None else out_XAH[group.kept_M]
