"""The prompts of rows that are being continued: who carries which, and attention to prompts that rows share.

A prompt that one row carries stands in front of that row's cache. A prompt that many rows carry is better left where it
is: their queries attend to it in one matrix product, each row attends to its own text in another, and one softmax goes
over both sets of scores. Nothing of the prompt is then copied or read once per row, and the result is the same.

Shape letters: R rows, P prompt columns, S text columns, A attention heads, N KV heads, H head size, G prompts, M rows
of the prompt with the most rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from softprompts.types import LayerKey, PromptStates

__all__ = ["PromptsOfRows", "worth_sharing"]

_FEWEST_ROWS = 4
"""Rows per prompt from which sharing its attention was measured to be faster than reading a copy per row."""
_FEWEST_COLUMNS = 1024
"""Prompt columns of all rows together, below which the few more operations of sharing cost more than they save."""


def worth_sharing(states: Sequence[PromptStates], rows: int) -> bool:
    """Decide how rows reach their prompts while they are continued: shared, or copied in front of each row's text."""
    longest = max((state.length for state in states), default=0)
    return bool(states) and rows >= _FEWEST_ROWS * len(states) and rows * longest >= _FEWEST_COLUMNS


class PromptsOfRows(Mapping[LayerKey, tuple[Tensor, Tensor]]):
    """Keys and values of the rows' prompts, per layer ``[R or 1, N, P, H]``, put together when they are asked for.

    Shorter prompts are padded at their end with zeros; which columns a row sees is said elsewhere
    (:func:`softprompts.models.inputs.visible_positions`).

    Args:
        states: The prompts in use, folded.
        prompt_of_row_R: Index of each row's prompt, -1 for none.
    """

    def __init__(self, states: Sequence[PromptStates], prompt_of_row_R: Tensor) -> None:
        self.states = list(states)
        self.prompt_of_row_R = prompt_of_row_R
        self.length = max((state.length for state in states), default=0)
        self._stacks: dict[LayerKey, tuple[Tensor, Tensor]] = {}

    def __getitem__(self, layer: LayerKey) -> tuple[Tensor, Tensor]:
        if len(self.states) == 1:
            keys, values = self.states[0].keys_values[layer]
            return keys[None], values[None]
        pairs = self._pairs(layer)
        prompts = self.prompt_of_row_R.clamp(min=0).tolist()
        keys_RNPH = torch.stack([pairs[prompt][0] for prompt in prompts])
        return keys_RNPH, torch.stack([pairs[prompt][1] for prompt in prompts])

    def __iter__(self) -> Iterator[LayerKey]:
        return iter({layer: None for state in self.states for layer in state.keys_values})

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, layer: object) -> bool:
        return any(layer in state.keys_values for state in self.states)

    def select(self, rows_R: Tensor) -> PromptsOfRows:
        """Return the same for rows ``rows_R`` of the present ones."""
        chosen = PromptsOfRows(self.states, self.prompt_of_row_R[rows_R])
        chosen._stacks = self._stacks
        return chosen

    def attend(
        self,
        layer: LayerKey,
        query_RA1H: Tensor,
        keys_RNSH: Tensor,
        values_RNSH: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        """Attention of one new token per row over ``[prompt; text]``, every prompt being read once.

        Args:
            layer: Where.
            query_RA1H: Queries.
            keys_RNSH: The text's.
            values_RNSH: The text's.
            mask: Bool ``[R or 1, 1, 1, P + S]``, or ``None`` where everything is visible.
            scale: Of the scores.

        Returns:
            ``[R, 1, A, H]``.
        """
        rows, heads = query_RA1H.shape[:2]
        query_RNgH = query_RA1H.reshape(rows, keys_RNSH.shape[1], -1, query_RA1H.shape[3])
        prompt_keys, prompt_values = (states.to(keys_RNSH.dtype) for states in self._stack(layer))
        in_front = self._per_prompt(query_RNgH, prompt_keys.transpose(2, 3))
        scores = torch.cat([in_front, query_RNgH @ keys_RNSH.transpose(2, 3)], dim=-1) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(values_RNSH.dtype)
        out = weights[..., self.length :] @ values_RNSH + self._per_prompt(weights[..., : self.length], prompt_values)
        return out.reshape(rows, 1, heads, -1)

    def _per_prompt(self, left_RNgX: Tensor, right_GNXY: Tensor) -> Tensor:
        """Multiply every row by the matrices of its prompt, ``[R, N, g, Y]``."""
        rows, kv_heads, groups, _ = left_RNgX.shape
        if len(self.states) == 1:
            flat_NRX = left_RNgX.transpose(0, 1).flatten(1, 2)
            return (flat_NRX @ right_GNXY[0]).view(kv_heads, rows, groups, -1).transpose(0, 1)
        row_GM, place_R = self._places
        per_prompt = left_RNgX[row_GM].transpose(1, 2).flatten(2, 3)  # [G, N, M * g, X]
        product = (per_prompt @ right_GNXY).unflatten(2, (row_GM.shape[1], groups)).transpose(1, 2)
        by_row_RNgY: Tensor = product.flatten(0, 1)[place_R]
        return by_row_RNgY

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Rows side by side per prompt ``[G, M]``, a few repeated to fill up, and where each row stands in it."""
        prompt_R = self.prompt_of_row_R.clamp(min=0)  # a row without prompt stands with the first and sees nothing
        order_R = prompt_R.argsort(stable=True)
        count_G = prompt_R.bincount(minlength=len(self.states))
        first_G = count_G.cumsum(0) - count_G
        slot_M = torch.arange(int(count_G.max()), device=prompt_R.device)
        index_GM = (first_G[:, None] + slot_M).clamp(max=len(prompt_R) - 1)
        place_R = torch.empty_like(order_R)
        sorted_R = prompt_R[order_R]
        rank_R = torch.arange(len(prompt_R), device=prompt_R.device) - first_G[sorted_R]
        place_R[order_R] = sorted_R * len(slot_M) + rank_R
        return order_R[index_GM], place_R

    def _stack(self, layer: LayerKey) -> tuple[Tensor, Tensor]:
        """All prompts in use, ``[G, N, P, H]``, put together once."""
        if layer not in self._stacks:
            pairs = self._pairs(layer)
            keys_GNPH = torch.stack([keys for keys, _ in pairs])
            self._stacks[layer] = keys_GNPH, torch.stack([values for _, values in pairs])
        return self._stacks[layer]

    def _pairs(self, layer: LayerKey) -> list[tuple[Tensor, Tensor]]:
        """Every prompt's keys and values of a layer, all of one length; zeros where a prompt does not reach it."""
        held = [state.keys_values.get(layer) for state in self.states]
        keys, values = next(pair for pair in held if pair is not None)
        blank = (keys[:, :0], values[:, :0])
        pairs = [blank if pair is None else pair for pair in held]
        return [(_padded(keys, self.length), _padded(values, self.length)) for keys, values in pairs]


def _padded(states_NPH: Tensor, length: int) -> Tensor:
    missing = length - states_NPH.shape[1]
    return pad(states_NPH, (0, 0, 0, missing)) if missing else states_NPH
