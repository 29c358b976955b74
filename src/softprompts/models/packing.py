"""Rows without padding: all real tokens of a batch in one long row, and where each row lies in it.

The linear layers, norms and MLPs of a model treat every token alike, so they run on the packed tokens and never see a
pad. Only attention has to know where a row begins and ends and which prompt stands in front of it: it is computed
block by block (:mod:`softprompts.models.kernels`), so a packed batch is exactly the padded one without the waste.

Shape letters: B rows, T text tokens, M packed tokens, P prompt length, D width, K prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompts.types import LayerKey, PromptStates

__all__ = ["Block", "Packing", "PromptSpan", "Slots", "attention_slots", "pack"]

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
    keys_values: Sequence[Mapping[LayerKey, tuple[Tensor, Tensor]]]
    """Per prompt in use: its keys and values ``[N, P, H]``, empty for an embedded one."""

    @property
    def tokens(self) -> int:
        """M, the tokens of embedded prompts included."""
        return int(self.position_M.shape[0])


def pack(mask_BT: Tensor, states: Sequence[PromptStates], prompt_of_row_B: Tensor) -> Packing:
    """Lay the rows of a batch out one after the other, those of one prompt side by side.

    Embeddings in front of a causal model are not run beforehand: their tokens lead the packed row, and all rows of
    the prompt attend to the keys and values that they have there. One pass does both.

    Args:
        mask_BT: 1 on real tokens, padded on either side.
        states: The prompts in use, folded or as embeddings.
        prompt_of_row_B: Index into ``states``, -1 for none.
    """
    device = mask_BT.device
    lengths = mask_BT.sum(dim=1).tolist()
    prompts = prompt_of_row_B.tolist()
    order = sorted(range(len(lengths)), key=lambda row: prompts[row])  # stable: rows of one prompt keep their order
    embedded: list[tuple[int, int] | None] = []
    start = 0
    for state in states:
        inside = state.embeddings_PD is not None
        embedded.append((start, start + state.length) if inside else None)
        start += state.length if inside else 0
    pieces = [(place[0], place[1] - place[0], 0) for place in embedded if place is not None]
    spans: list[PromptSpan] = []
    for row in order:
        prompt = prompts[row]
        pieces.append((start, lengths[row], states[prompt].length if prompt >= 0 else 0))
        if prompt >= 0 and spans and spans[-1].prompt == prompt:
            spans[-1] = PromptSpan(spans[-1].start, start + lengths[row], prompt, embedded[prompt])
        elif prompt >= 0:
            spans.append(PromptSpan(start, start + lengths[row], prompt, embedded[prompt]))
        start += lengths[row]
    position_M = torch.cat([torch.arange(first, first + length) for _, length, first in pieces]).to(device)
    row_index, column_index = torch.nonzero(mask_BT[torch.tensor(order, device=device)], as_tuple=True)
    index_M = torch.tensor(order, device=device)[row_index] * mask_BT.shape[1] + column_index
    packed_of_BT = torch.zeros(mask_BT.numel(), dtype=torch.long, device=device)
    packed_of_BT[index_M] = torch.arange(start - len(index_M), start, device=device)
    return Packing(
        index_M=index_M,
        packed_of_BT=packed_of_BT.view(mask_BT.shape),
        position_M=position_M,
        embeddings=tuple(state.embeddings_PD for state in states if state.embeddings_PD is not None),
        slots=attention_slots([(first, length) for first, length, _ in pieces if length], device),
        spans=tuple(span for span in spans if span.end > span.start),
        keys_values=[state.keys_values for state in states],
    )


def attention_slots(pieces: Sequence[tuple[int, int]], device: torch.device) -> Slots:
    """Group rows of similar length, so that attention pads little in few calls.

    Args:
        pieces: First packed token and length (at least 1) of every row, in packed order.
        device: Where the indices are used.
    """
    groups: list[list[tuple[int, int]]] = []
    for piece in sorted(pieces, key=lambda piece: -piece[1]):
        short = bool(groups) and piece[1] < _SHORTEST_SHARE * groups[-1][0][1]
        # a single long row (a prompt of 100 tokens in front of short texts) is worth a call of its own
        if not groups or (short and (len(groups[-1]) >= _FEWEST_ROWS_OF_A_BLOCK or piece[1] * 2 < groups[-1][0][1])):
            groups.append([])
        groups[-1].append(piece)
    blocks: list[Block] = []
    firsts: list[Tensor] = []
    columns: list[Tensor] = []
    lengths: list[Tensor] = []
    first_slot = 0
    for group in groups:
        longest = group[0][1]
        blocks.append(Block(first_slot, len(group), longest))
        first_slot += len(group) * longest
        firsts.append(torch.tensor([first for first, _ in group]).repeat_interleave(longest))
        lengths.append(torch.tensor([length for _, length in group]).repeat_interleave(longest))
        columns.append(torch.arange(longest).repeat(len(group)))
    first_S, column_S, length_S = torch.cat(firsts), torch.cat(columns), torch.cat(lengths)
    real_S = column_S < length_S
    tokens_S = first_S + column_S * real_S
    slot_M = torch.empty(int(real_S.sum()), dtype=torch.long)
    slot_M[tokens_S[real_S]] = torch.nonzero(real_S)[:, 0]
    pad_S1 = torch.zeros(len(tokens_S), 1).masked_fill_(~real_S[:, None], torch.inf)
    return Slots(tuple(blocks), tokens_S.to(device), slot_M.to(device), pad_S1.to(device))
