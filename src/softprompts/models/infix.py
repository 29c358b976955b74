"""Infixes: prompts between the input and the output of a row, ``[x; INFIX; y]`` (Li & Liang 2021, section 7.3).

What stands in front of an infix does not see it and counts its positions from 0; what stands behind it sees it and
goes on counting from where the infix ends. A prefix is the case that nothing stands in front.

Learned keys and values stay in the attention and are shared by all rows, like those of a prefix. Learned embeddings
evoke other states in every row, because they see the row's input: they are put into the text of each row, and from
there on they are text like any other (also for sliding windows).

Shape letters: B batch, T text tokens, S tokens of text and infix, P longest infix, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from softprompts.errors import DataError
from softprompts.types import Batch, PromptStates

__all__ = ["check_seen", "inlined", "places_in_text", "prompt_starts"]


def places_in_text(mask_BT: Tensor) -> Tensor:
    """Number every row's real tokens from 0, ``[B, T]``; -1 at pads in front of them."""
    return mask_BT.long().cumsum(dim=1) - 1


def prompt_starts(states: Sequence[PromptStates], prompt_of_row_B: Tensor, infix_B: Tensor | None) -> Tensor | None:
    """Real tokens in front of each row's prompt, ``[B]``; ``None`` where all prompts stand in front.

    Args:
        states: The prompts in use.
        prompt_of_row_B: Each row's index into them, -1 for none.
        infix_B: Where an infix goes; see :class:`~softprompts.types.Batch`.

    Raises:
        DataError: A row carries an infix and does not say where it goes.
    """
    if not any(state.infix for state in states):
        return None
    is_infix = torch.tensor([*(state.infix for state in states), False], device=prompt_of_row_B.device)
    return torch.where(is_infix[prompt_of_row_B], _known(infix_B), 0)


def _known(infix_B: Tensor | None) -> Tensor:
    if infix_B is None:
        raise DataError(
            "a row carries an infix, but does not say where its input ends; encode it with the format of a task, or "
            "set Encoded.infix_at"
        )
    return infix_B


def check_seen(place_M: Tensor, start_M: Tensor) -> None:
    """Refuse to predict a token where the infix of its row is not seen.

    Args:
        place_M: Places in the text from which tokens are predicted.
        start_M: Real tokens in front of the prompt of their rows.

    Raises:
        DataError: Nothing but the infix stands between a row's input and its output.
    """
    if bool((place_M < start_M).any()):
        raise DataError(
            "a row has no token between its input and its output, so the output's first token would be predicted from "
            "the input, which does not see the infix; give the format a separator"
        )


def inlined(
    batch: Batch, states: Sequence[PromptStates], prompt_of_row_B: Tensor, embed: Callable[[Tensor], Tensor]
) -> tuple[Batch, Tensor | None]:
    """Put embeddings that are infixes into the text of their rows.

    Args:
        batch: Padded on either side.
        states: The prompts in use.
        prompt_of_row_B: Each row's index into them, -1 for none.
        embed: Ids to embeddings, the model's own.

    Returns:
        The batch with the longer rows and all their embeddings ``[B, S, D]``; the rows carry no prompt any more, and
        their ids mean nothing where their prompt stands. The batch as it is and ``None`` where there is no such row.

    Raises:
        DataError: A row does not say where its infix goes.
    """
    tables = [state.embeddings_PD if state.infix else None for state in states]
    device = prompt_of_row_B.device
    length_B = torch.tensor([*(0 if table is None else len(table) for table in tables), 0], device=device)[
        prompt_of_row_B
    ]
    if not bool(length_B.any()):
        return batch, None
    infix_B = _known(batch.infix_B)
    mask_BT = batch.mask_BT
    total_B = mask_BT.sum(dim=1) + length_B
    width, longest = int(total_B.max()), int(length_B.max())
    first_B = width - total_B if bool(mask_BT[:, -1].all()) else torch.zeros_like(total_B)
    place_BS = torch.arange(width, device=device) - first_B[:, None]
    real_BS = (place_BS >= 0) & (place_BS < total_B[:, None])
    inside_BS = (place_BS >= infix_B[:, None]) & (place_BS < (infix_B + length_B)[:, None])
    # Where each token comes from in the row [all P rows of its infix][all T columns of its text]:
    text_BT = torch.argsort(mask_BT == 0, dim=1, stable=True)  # columns of the real tokens, in order
    behind_BS = place_BS - length_B[:, None] * (place_BS >= infix_B[:, None])
    column_BS = text_BT.gather(1, behind_BS.clamp(min=0, max=mask_BT.shape[1] - 1))
    source_BS = torch.where(inside_BS, place_BS - infix_B[:, None], longest + column_BS)
    embeddings_BTD = embed(batch.ids_BT)
    rows_BPD = _tables_of_rows(tables, prompt_of_row_B, longest, embeddings_BTD)
    both_BXD = torch.cat([rows_BPD, embeddings_BTD], dim=1)
    embeddings_BSD = both_BXD.gather(1, source_BS[:, :, None].expand(-1, -1, both_BXD.shape[2]))
    labels_BS = None
    if batch.labels_BT is not None:
        labels_BS = batch.labels_BT.gather(1, column_BS).masked_fill(inside_BS | ~real_BS, -100)
    longer = replace(
        batch,
        ids_BT=batch.ids_BT.gather(1, column_BS),
        mask_BT=real_BS.to(mask_BT.dtype),
        labels_BT=labels_BS,
        prompt_of_row_B=batch.prompt_of_row_B.masked_fill(length_B > 0, -1),
    )
    return longer, embeddings_BSD


def _tables_of_rows(tables: Sequence[Tensor | None], prompt_of_row_B: Tensor, longest: int, like_BTD: Tensor) -> Tensor:
    """Embeddings of each row's infix ``[B, longest, D]``, filled up with what nobody reads."""
    blank_PD = like_BTD.new_zeros(longest, like_BTD.shape[2])
    filled = [
        blank_PD
        if table is None
        else torch.nn.functional.pad(table.to(like_BTD.dtype), (0, 0, 0, longest - len(table)))
        for table in (*tables, None)  # the last one is that of index -1
    ]
    return torch.stack(filled)[prompt_of_row_B]
