"""Positions and masks: the one place that decides where a token stands and who sees a prompt.

Layouts: ``[pads][prompt][text]`` for left padding and ``[prompt][text][pads]`` for right padding. The prompt lives in
the attention (it occupies no column of ``ids_BT``), so both come down to two rules, per row: real tokens count from
the length of the row's own prompt, and the prompt is visible to all of them.

Shape letters: B batch, T text tokens, P longest prompt, K prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from softprompts.errors import DataError, LengthError
from softprompts.types import Batch, Geometry, LayerKey, PromptStates

__all__ = [
    "check_length",
    "differing_visibility",
    "label_positions",
    "left_aligned",
    "position_ids",
    "prompt_lengths",
    "prompts_in_use",
    "rows_of_prompts",
    "visible_positions",
]


def prompt_lengths(states: Sequence[PromptStates], prompt_of_row_B: Tensor) -> Tensor:
    """Return how many prompt positions stand in front of each row, ``[B]`` (0 for a row without prompt)."""
    lengths_K = torch.tensor([*(state.length for state in states), 0], device=prompt_of_row_B.device)
    return lengths_K[prompt_of_row_B]  # index -1 is the 0 at the end


def position_ids(mask_BT: Tensor, length_B: Tensor, start_B: Tensor | None = None) -> Tensor:
    """Positions from the mask: the first real token of a row stands right behind its prompt.

    Pads get the position of the first token; nobody attends to them. GPT-2 counts like this in the prefix-tuning code
    (real tokens start at ``past_length``).

    Args:
        mask_BT: 1 on real tokens, either side padded.
        length_B: Prompt length of each row.
        start_B: Real tokens in front of each row's prompt, which count as if there were none; ``None`` for none.

    Returns:
        ``[B, T]``, int64.
    """
    place_BT = (mask_BT.long().cumsum(dim=1) - 1).clamp(min=0)
    if start_B is None:
        return place_BT + length_B[:, None]
    return place_BT + length_B[:, None] * (place_BT >= start_B[:, None])


def left_aligned(batch: Batch) -> Batch:
    """Move every row's pads to its left, so that what is generated continues the text without a gap.

    A sliding window counts columns, so pads between a text and its continuation would push the text out of it.
    """
    if bool(batch.mask_BT[:, -1].all()):
        return batch
    T = batch.mask_BT.shape[1]
    last_B = (batch.mask_BT * torch.arange(1, T + 1, device=batch.mask_BT.device)).amax(dim=1)
    columns_BT = (torch.arange(T, device=last_B.device)[None] - (T - last_B)[:, None]) % T
    return Batch(
        ids_BT=batch.ids_BT.gather(1, columns_BT),
        mask_BT=batch.mask_BT.gather(1, columns_BT),
        labels_BT=None,
        prompt_of_row_B=batch.prompt_of_row_B,
        infix_B=batch.infix_B,
    )


def visible_positions(states: Sequence[PromptStates], prompt_of_row_B: Tensor) -> Tensor | None:
    """Which of the P prompt columns each row sees, bool ``[B, P]``; ``None`` where all rows see all of them."""
    length_B = prompt_lengths(states, prompt_of_row_B)
    longest = max((state.length for state in states), default=0)
    if bool((length_B == longest).all()):
        return None
    return torch.arange(longest, device=length_B.device)[None, :] < length_B[:, None]


def differing_visibility(states: Sequence[PromptStates], prompt_of_row_B: Tensor) -> dict[LayerKey, Tensor]:
    """Which prompt columns each row sees in the layers that not all of these prompts reach, bool ``[B, P]``.

    A prefix may live in some layers only, and an embedding prompt of an encoder-decoder in none; in the layers that a
    row's prompt does not reach, the row sees nothing of what is there for others.
    """
    everywhere = {layer for state in states for layer in state.keys_values}
    longest = max((state.length for state in states), default=0)
    shared: dict[tuple[bool, ...], Tensor] = {}
    visible_at: dict[LayerKey, Tensor] = {}
    for layer in everywhere:
        reached = tuple(layer in state.keys_values for state in states)
        if all(reached):
            continue
        if reached not in shared:  # layers that the same prompts reach share one mask
            lengths = [state.length if has else 0 for state, has in zip(states, reached, strict=True)]
            length_B = torch.tensor([*lengths, 0], device=prompt_of_row_B.device)[prompt_of_row_B]
            shared[reached] = torch.arange(longest, device=length_B.device)[None, :] < length_B[:, None]
        visible_at[layer] = shared[reached]
    return visible_at


def prompts_in_use(states: Sequence[PromptStates], prompt_of_row_B: Tensor) -> tuple[list[PromptStates], Tensor]:
    """Leave out the prompts that no row of this batch carries (thousands may be resident).

    Returns:
        The prompts in use, and the rows' indices into them (-1 stays -1).
    """
    used = torch.unique(prompt_of_row_B)
    used = used[used >= 0]
    renumbered = torch.full((len(states) + 1,), -1, device=used.device)  # the entry at the end is that of index -1
    renumbered[used] = torch.arange(len(used), device=used.device)
    return [states[index] for index in used.tolist()], renumbered[prompt_of_row_B]


def rows_of_prompts(
    states: Sequence[PromptStates], prompt_of_row_B: Tensor
) -> Mapping[LayerKey, tuple[Tensor, Tensor]]:
    """Lay the prompts' keys and values out for the rows of a batch.

    Args:
        states: The prompts in use, keys and values ``[N, P, H]``.
        prompt_of_row_B: Index of each row's prompt, -1 for none.

    Returns:
        Per layer ``[1, N, P, H]`` where there is one prompt (it is never copied per row), otherwise ``[B, N, P, H]``,
        shorter prompts padded at their end with zeros that no row sees.
    """
    if len(states) == 1:
        return {layer: (keys[None], values[None]) for layer, (keys, values) in states[0].keys_values.items()}
    layers: dict[LayerKey, tuple[Tensor, Tensor]] = {}
    if not states:
        return layers
    longest = max(state.length for state in states)
    index_B = prompt_of_row_B.clamp(min=0)
    for layer in {layer: None for state in states for layer in state.keys_values}:  # in order, each once
        pairs = [state.keys_values.get(layer) for state in states]
        keys, values = next(pair for pair in pairs if pair is not None)
        # A prompt that does not reach this layer leaves a blank that no row sees (see differing_visibility).
        blanks = (_blank(keys, longest), _blank(values, longest))
        filled = [blanks if pair is None else (_padded(pair[0], longest), _padded(pair[1], longest)) for pair in pairs]
        keys_K, values_K = (torch.stack(columns) for columns in zip(*filled, strict=True))
        layers[layer] = (keys_K[index_B], values_K[index_B])
    return layers


def _blank(states_NPH: Tensor, longest: int) -> Tensor:
    return states_NPH.new_zeros(states_NPH.shape[0], longest, states_NPH.shape[2])


def _padded(states_NPH: Tensor, longest: int) -> Tensor:
    missing = longest - states_NPH.shape[1]
    return torch.nn.functional.pad(states_NPH, (0, 0, 0, missing)) if missing else states_NPH


def label_positions(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Where the loss looks: label t of a row is predicted from the hidden state at t - 1.

    Returns:
        ``(row_M, column_M, labels_M)``; ``column_M`` indexes hidden states.

    Raises:
        DataError: The batch has no labels, or a label has no real token in front of it.
    """
    if batch.labels_BT is None:
        raise DataError("this batch has no labels; encode it with its targets")
    row_M, column_M = torch.nonzero(batch.labels_BT != -100, as_tuple=True)
    before_M = column_M - 1
    if bool((before_M < 0).any()) or not bool(batch.mask_BT[row_M, before_M.clamp(min=0)].all()):
        raise DataError(
            "the first token of a row cannot be a label: nothing stands in front of it to predict it from; "
            "give the format an input or a separator"
        )
    return row_M, before_M, batch.labels_BT[row_M, column_M]


def check_length(geometry: Geometry, prompt_length: int, text_length: int) -> None:
    """Refuse a row that does not fit into the model's context.

    Raises:
        LengthError: Prompt and text are longer than the model was made for.
    """
    limit = geometry.max_positions
    if limit is not None and prompt_length + text_length > limit:
        raise LengthError(
            f"a row of {text_length} tokens behind a prompt of {prompt_length} needs {prompt_length + text_length} "
            f"positions, but this {geometry.family} has {limit}; shorten the text or the prompt"
        )
