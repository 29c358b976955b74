"""Rows without padding: all real tokens of a batch in one long row, and where each row lies in it.

The linear layers, norms and MLPs of a model treat every token alike, so they run on the packed tokens and never see a
pad. Only attention has to know where a row begins and ends and which prompt stands in front of it: it is computed
block by block (:mod:`softprompts.models.kernels`), so a packed batch is exactly the padded one without the waste.

Shape letters: B rows, T text tokens, M packed tokens, P prompt length, D width, K prompts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softprompts.models.sources import Held
from softprompts.types import LayerKey, PromptStates

__all__ = ["Block", "Packing", "PromptSpan", "RowPlace", "Slots", "attention_slots", "pack"]

_SHORTEST_SHARE = 0.7
"""Rows shorter than this share of the longest row of their block open a block of their own."""
_FEWEST_ROWS_OF_A_BLOCK = 4
"""A block costs a few kernel calls, so short blocks are not split off from each other."""


@dataclass(frozen=True)
class Block:
    """Rows of similar length whose attention among themselves is one call of a kernel."""

    first_slot: int
    rows: int
    longest: int

    @property
    def slots(self) -> slice:
        """Its slots among those of all blocks."""
        return slice(self.first_slot, self.first_slot + self.rows * self.longest)


@dataclass(frozen=True)
class Slots:
    """Packed rows laid out side by side again, block by block, for attention alone; S slots, pads among them."""

    blocks: tuple[Block, ...]
    tokens_S: Tensor
    """Packed token in every slot; a pad repeats the first token of its row."""
    slot_M: Tensor
    """Slot of every packed token."""
    pad_S1: Tensor
    """0 at tokens and infinity at pads; added to the log-sum-exp of the scores it takes pads out of gradients."""
    blocks_X3: Tensor
    """The blocks' three numbers, on the CPU, for a compiled model."""


class RowPlace(NamedTuple):
    """Where the tokens of one row lie in the packed row: side by side, or in two pieces."""

    first: int
    length: int
    """At least 1."""
    jump_at: int = 0
    """Tokens of the first piece, where there are two."""
    jump: int = 0
    """Packed tokens of other rows between the two pieces."""


class _Piece(NamedTuple):
    """Tokens that lie side by side in the packed row and have positions that follow each other."""

    row: int
    first: int
    """Its first token's number among the real tokens of the row."""
    length: int
    position: int


@dataclass(frozen=True)
class PromptSpan:
    """Neighbouring packed tokens that see one prompt."""

    start: int
    end: int
    prompt: int
    """Index of the prompt among those in use."""
    embedded: tuple[int, int] | None
    """Where the prompt's own tokens lie in the packed row, or ``None`` where it comes as keys and values."""


@dataclass(frozen=True)
class Packing:
    """One batch as one long row."""

    index_M: Tensor
    """Text tokens: their index in the flattened ``[B * T]`` batch, packed order."""
    packed_of_BT: Tensor
    """Packed index of every position of the batch, ``[B, T]``; 0 at pads."""
    position_M: Tensor
    """Position of every packed token, the tokens of embedded prompts in front."""
    embeddings: tuple[Tensor, ...]
    """Prompts that are run together with the text, ``[P, D]`` each, in front of it."""
    slots: Slots
    spans: tuple[PromptSpan, ...]
    spans_Y5: Tensor
    """Start, end, prompt, and where an embedded prompt lies (or 0, 0): the spans, on the CPU, for a compiled model."""
    keys_values: Sequence[Mapping[LayerKey, tuple[Tensor, Tensor]]]
    """Per prompt in use: its keys and values ``[N, P, H]``, empty for an embedded one."""
    block_masks: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What FlexAttention made of this packing, per kind of layer."""
    held: Held | None = None
    """What stands in front of the rows and is not computed again."""

    @property
    def tokens(self) -> int:
        """M, the tokens of embedded prompts included."""
        return int(self.position_M.shape[0])


def pack(
    mask_BT: Tensor,
    states: Sequence[PromptStates],
    prompt_of_row_B: Tensor,
    start_B: Tensor | None = None,
    offset_B: Tensor | None = None,
) -> Packing:
    """Lay the rows of a batch out one after the other, those of one prompt side by side.

    Embeddings in front of a causal model are not run beforehand: their tokens lead the packed row, and all rows of
    the prompt attend to the keys and values that they have there. One pass does both.

    The tokens that see a prompt are neighbours, so what stands in front of an infix comes first, for all rows of that
    prompt, and then what stands behind it.

    Args:
        mask_BT: 1 on real tokens, padded on either side.
        states: The prompts in use, folded or as embeddings.
        prompt_of_row_B: Index into ``states``, -1 for none.
        start_B: Real tokens in front of each row's prompt; ``None`` for none anywhere.
        offset_B: Position of each row's first token, its prompt not counted; ``None`` for 0 everywhere.
    """
    device = mask_BT.device
    lengths = mask_BT.sum(dim=1).tolist()
    prompts = prompt_of_row_B.tolist()
    starts = [0] * len(lengths) if start_B is None else start_B.tolist()
    offsets = [0] * len(lengths) if offset_B is None else offset_B.tolist()
    embedded: list[tuple[int, int] | None] = []
    start = 0
    for state in states:
        inside = state.embeddings_PD is not None
        embedded.append((start, start + state.length) if inside else None)
        start += state.length if inside else 0
    places = [RowPlace(place[0], place[1] - place[0]) for place in embedded if place is not None]
    position_M = [torch.arange(place.length) for place in places]
    real_X = mask_BT.flatten().nonzero()[:, 0]
    before = [0, *itertools.accumulate(lengths)]
    index_M, spans, first = [real_X[:0]], [], start
    for prompt in sorted(set(prompts)):
        rows = [row for row, own in enumerate(prompts) if own == prompt]
        in_front = [_Piece(row, 0, starts[row], offsets[row]) for row in rows]
        shift = states[prompt].length if prompt >= 0 else 0
        behind = [_Piece(r, starts[r], lengths[r] - starts[r], offsets[r] + starts[r] + shift) for r in rows]
        pieces = [piece for piece in (*in_front, *behind) if piece.length > 0]
        index_M += [real_X[before[p.row] + p.first :][: p.length] for p in pieces]
        position_M += [torch.arange(p.position, p.position + p.length) for p in pieces]
        places += _places(start, pieces)
        end = start + sum(piece.length for piece in pieces)
        seen = sum(piece.length for piece in behind if piece.length > 0)
        if prompt >= 0 and seen:
            spans.append(PromptSpan(end - seen, end, prompt, embedded[prompt]))
        start = end
    packed_of_BT = torch.zeros(mask_BT.numel(), dtype=torch.long, device=device)
    packed_of_BT[torch.cat(index_M)] = torch.arange(first, start, device=device)
    return Packing(
        index_M=torch.cat(index_M),
        packed_of_BT=packed_of_BT.view(mask_BT.shape),
        position_M=torch.cat(position_M).to(device),
        embeddings=tuple(state.embeddings_PD for state in states if state.embeddings_PD is not None),
        slots=attention_slots(places, device),
        spans=tuple(spans),
        spans_Y5=torch.tensor([[s.start, s.end, s.prompt, *(s.embedded or (0, 0))] for s in spans]).view(-1, 5),
        keys_values=[state.keys_values for state in states],
    )


def _places(start: int, pieces: Sequence[_Piece]) -> list[RowPlace]:
    """Say where each row lies whose pieces follow each other from a packed token on."""
    places: dict[int, RowPlace] = {}
    for piece in pieces:
        own = places.get(piece.row)
        if own is None:
            places[piece.row] = RowPlace(start, piece.length)
        else:
            jump = start - own.first - own.length
            places[piece.row] = RowPlace(own.first, own.length + piece.length, own.length, jump)
        start += piece.length
    return list(places.values())


def attention_slots(places: Sequence[RowPlace], device: torch.device) -> Slots:
    """Group rows of similar length, so that attention pads little in few calls.

    Args:
        places: Where every row lies.
        device: Where the indices are used.
    """
    groups: list[list[RowPlace]] = []
    for place in sorted(places, key=lambda place: -place.length):
        short = bool(groups) and place.length < _SHORTEST_SHARE * groups[-1][0].length
        # a single long row (a prompt of 100 tokens in front of short texts) is worth a call of its own
        if not groups or (
            short and (len(groups[-1]) >= _FEWEST_ROWS_OF_A_BLOCK or place.length * 2 < groups[-1][0].length)
        ):
            groups.append([])
        groups[-1].append(place)
    blocks: list[Block] = []
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    first_slot = 0
    for group in groups:
        longest = group[0].length
        blocks.append(Block(first_slot, len(group), longest))
        first_slot += len(group) * longest
        rows.append(torch.tensor(group).repeat_interleave(longest, dim=0))
        columns.append(torch.arange(longest).repeat(len(group)))
    first_S, length_S, jump_at_S, jump_S = torch.cat(rows).unbind(dim=1)
    column_S = torch.cat(columns)
    real_S = column_S < length_S
    tokens_S = first_S + (column_S + jump_S * (column_S >= jump_at_S)) * real_S
    slot_M = torch.empty(int(real_S.sum()), dtype=torch.long)
    slot_M[tokens_S[real_S]] = torch.nonzero(real_S)[:, 0]
    pad_S1 = torch.zeros(len(tokens_S), 1).masked_fill_(~real_S[:, None], torch.inf)
    blocks_X3 = torch.tensor([[block.first_slot, block.rows, block.longest] for block in blocks])
    return Slots(tuple(blocks), tokens_S.to(device), slot_M.to(device), pad_S1.to(device), blocks_X3)
