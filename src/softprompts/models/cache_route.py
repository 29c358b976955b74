"""Prompts as columns of the text: through the KV cache, or as embeddings in the input.

Two kinds of model need this. Old families compute attention in a way that cannot be reached, but read whatever keys
and values stand in their cache: a prefix is put there before the text is read. Models with a recurrent state
(state-space layers, linear attention, short convolutions) keep more of a prompt than keys and values, so an embedding
prompt is not folded but read together with the text of its row.

Either way the prompt occupies columns of its own, right in front of its row's text, so that whatever counts columns
(ALiBi, a window inside the model) counts right: ``[prompt][text][pads]`` while a batch is read from the cache,
``[pads][prompt][text]`` in an input and in every cache that is decoded from.

Shape letters: B batch, T text tokens of this forward, P longest prompt, S text tokens so far, D width, N KV heads, H
head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from softprompts.types import LayerKey

__all__ = [
    "Forward",
    "held_keys_values",
    "is_stateful",
    "mask_behind",
    "read_behind_cache",
    "read_behind_embeddings",
    "select_rows",
]

Forward = Callable[..., Tensor]
"""The model without its head: tokens, mask, positions and cache to hidden states ``[B, T, D]``."""


def held_keys_values(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values ``[B, N, S, H]`` of the cache's layers that have any, in the order of the layers."""
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    return [(keys, values) for keys, values in pairs if keys is not None and values is not None]


def is_stateful(cache: Cache) -> bool:
    """Whether some layer keeps a recurrent state, so that keys and values are not all that a text leaves behind."""
    return any(hasattr(layer, "conv_states") for layer in cache.layers)


def select_rows(cache: Cache, rows_R: Tensor) -> None:
    """Keep, reorder and repeat the rows of a cache that may hold recurrent states beside keys and values."""
    layers: list[Any] = cache.layers
    for layer in layers:
        if hasattr(layer, "conv_states"):
            layer.reorder_cache(rows_R)
        else:
            layer.batch_select_indices(rows_R)


def read_behind_cache(
    run: Forward,
    keys_values: Mapping[LayerKey, tuple[Tensor, Tensor]],
    visible_BP: Tensor | None,
    inputs: Mapping[str, Any],
) -> Tensor:
    """Read text behind prompts that stand in the cache.

    Args:
        run: The model.
        keys_values: The prompts', ``[B or 1, N, P, H]`` per layer, in the order of the layers.
        visible_BP: Which of their columns a row sees (its first ones); ``None`` for all.
        inputs: ``input_ids``, ``attention_mask`` (of the text), ``position_ids`` and perhaps ``past_key_values``,
            empty or as an earlier call left it.

    Returns:
        ``[B, T, D]``.
    """
    cache, mask_BS = inputs.get("past_key_values"), inputs["attention_mask"]
    longest = next(iter(keys_values.values()))[0].shape[2]
    if visible_BP is None:
        visible_BP = torch.ones(mask_BS.shape[0], longest, dtype=torch.bool, device=mask_BS.device)
    if cache is not None and cache.get_seq_length() > 0:
        return run(**{**inputs, "attention_mask": mask_behind(visible_BP, mask_BS)})
    front_BP, prompt_order_BP = _pads_first(visible_BP)  # shorter prompts move right, next to the text
    text_order_BT = torch.argsort((mask_BS == 0).int(), dim=1, stable=True)  # and texts move left, next to the prompt
    cache_ = DynamicCache() if cache is None else cache
    for number, pair in enumerate(keys_values.values()):
        rows = [states.expand(mask_BS.shape[0], -1, -1, -1) for states in pair]
        if not bool(visible_BP.all()):
            rows = [_columns(states, prompt_order_BP) for states in rows]
        cache_.update(rows[0], rows[1], number)
    mask_BC = torch.cat([front_BP.long(), mask_BS.gather(1, text_order_BT)], dim=1)
    moved = {name: inputs[name].gather(1, text_order_BT) for name in ("input_ids", "position_ids") if name in inputs}
    if "inputs_embeds" in inputs:
        words_BTD = inputs["inputs_embeds"]
        moved["inputs_embeds"] = words_BTD.gather(1, text_order_BT[..., None].expand_as(words_BTD))
    behind = {"attention_mask": mask_BC, "past_key_values": cache_, "use_cache": True}
    hidden_BTD = run(**{**inputs, **moved, **behind})
    if cache is not None and not bool(mask_BC[:, -1].all()):
        order_BC = _pads_first(mask_BC)[1]
        for layer in cache.layers:
            layer.keys, layer.values = _columns(layer.keys, order_BC), _columns(layer.values, order_BC)
    return _moved_back(hidden_BTD, text_order_BT)


def read_behind_embeddings(
    run: Forward,
    embed: Callable[[Tensor], Tensor],
    front_BPD: Tensor,
    visible_BP: Tensor,
    inputs: Mapping[str, Any],
) -> Tensor:
    """Read prompt and text of every row in one go.

    Args:
        run: The model.
        embed: Its input embeddings.
        front_BPD: The rows' prompts.
        visible_BP: Which of their columns belong to the row's prompt (its first ones).
        inputs: As for :func:`read_behind_cache`; the cache must be empty.

    Returns:
        ``[B, T, D]``, of the text alone.
    """
    mask_BT = inputs["attention_mask"]
    P = front_BPD.shape[1]
    words_BTD = inputs["inputs_embeds"] if "inputs_embeds" in inputs else embed(inputs["input_ids"])
    both_BCD = torch.cat([front_BPD, words_BTD], dim=1)
    mask_BC, order_BC = _pads_first(torch.cat([visible_BP.long(), mask_BT], dim=1))
    front_BP = torch.arange(P, device=mask_BT.device).expand(mask_BT.shape[0], -1)
    position_BC = torch.cat([front_BP, inputs["position_ids"]], dim=1).gather(1, order_BC)
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "inputs_embeds")}
    moved_BCD = both_BCD.gather(1, order_BC[..., None].expand_as(both_BCD))
    hidden_BCD = run(**{**rest, "inputs_embeds": moved_BCD, "attention_mask": mask_BC, "position_ids": position_BC})
    return _moved_back(hidden_BCD, order_BC)[:, P:]


def mask_behind(visible_BP: Tensor, mask_BS: Tensor) -> Tensor:
    """Mask of prompt and text ``[B, P + S]`` as they stand in a cache that is decoded from: pads first."""
    return _pads_first(torch.cat([visible_BP.long(), mask_BS], dim=1))[0]


def _pads_first(mask_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Bring the columns that are seen to the right, in their order; returns the mask and which column stands where."""
    order_BC = torch.argsort(mask_BC.int(), dim=1, stable=True)
    return mask_BC.gather(1, order_BC), order_BC


def _columns(states_BNCH: Tensor, order_BC: Tensor) -> Tensor:
    index = order_BC[:, None, :, None].expand(-1, states_BNCH.shape[1], -1, states_BNCH.shape[3])
    return states_BNCH.gather(2, index)


def _moved_back(hidden_BCD: Tensor, order_BC: Tensor) -> Tensor:
    inverse_BC = torch.argsort(order_BC, dim=1)
    return hidden_BCD.gather(1, inverse_BC[..., None].expand_as(hidden_BCD))
