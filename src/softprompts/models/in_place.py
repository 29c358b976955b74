"""A cache that is written in place: a decoding step adds one column and copies nothing that is already there.

The cache of transformers joins old and new keys by copying both, in every layer and step; prompts in front of it would
be copied as often. Here every layer owns a buffer with room to grow and hands out views of it. The first columns of
the buffer are kept free for the rows' prompts, which are written there once. The model never hears of them: what it
asks for (lengths, masks) is about its text alone.

Shape letters: B rows, S text columns so far, P prompt columns, C columns of the buffer, N KV heads, H head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

__all__ = ["InPlaceCache", "InPlaceLayer"]

_LEAST_ROOM = 64
"""Columns that are free after the first forward pass."""


class InPlaceLayer(CacheLayerMixin):
    """Keys and values of one layer, ``keys`` and ``values`` being views ``[B, N, S, H]`` of its buffers.

    It forgets nothing: layers with a sliding window leave that to the mask.

    Args:
        front: P, columns to keep free for prompts.
    """

    is_sliding = False

    def __init__(self, front: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.front = front
        self.has_front = False
        self._rows = self._length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make buffers for the rows, heads and sizes of the first states."""
        self._rows = key_states.shape[0]
        first = self.front + key_states.shape[2]
        columns = first + max(_LEAST_ROOM, first // 2)
        self._keys, self._values = (_buffer(states, self._rows, columns) for states in (key_states, value_states))
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append states ``[B, N, T, H]`` and return all of the text's, ``[B, N, S, H]``."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.front + self._length
        self._length += key_states.shape[2]
        end = self.front + self._length
        if end > self._keys.shape[2]:
            self._grow(max(end, 2 * self._keys.shape[2]))
        self._keys[: self._rows, :, start:end] = key_states
        self._values[: self._rows, :, start:end] = value_states
        return self._set_views()

    def put_front(self, keys: Tensor, values: Tensor) -> None:
        """Write the prompts, ``[B or 1, N, P, H]``, in front of the text."""
        self._keys[: self._rows, :, : self.front] = keys
        self._values[: self._rows, :, : self.front] = values
        self.has_front = True

    def behind_front(self) -> tuple[Tensor, Tensor]:
        """Keys and values of prompt and text, views ``[B, N, P + S, H]``."""
        end = self.front + self._length
        return self._keys[: self._rows, :, :end], self._values[: self._rows, :, :end]

    def select(self, rows_R: Tensor, moved_M: Tensor, since: int = 0) -> None:
        """Make row i that of the present row ``rows_R[i]``.

        Args:
            rows_R: Rows to keep, in order, repeated where wanted.
            moved_M: Those i that are not already at their place (with more rows than before, none may be left out).
            since: Text columns before this one stay where they are, and the prompts with them.
        """
        if not self.is_initialized:
            return
        end = self.front + self._length
        if len(rows_R) > self._keys.shape[0]:
            held = (self._keys[: self._rows, :, :end], self._values[: self._rows, :, :end])
            grown = [_buffer(states, len(rows_R), self._keys.shape[2]) for states in held]
            for new, states in zip(grown, held, strict=True):
                new[:, :, :end] = states.index_select(0, rows_R)
            self._keys, self._values = grown
        else:
            columns = slice(self.front + since if since else 0, end)
            for buffer in (self._keys, self._values) if len(moved_M) else ():
                # the right side is a copy, so rows that swap places do not overwrite each other
                buffer[:, :, columns].index_copy_(0, moved_M, buffer[:, :, columns].index_select(0, rows_R[moved_M]))
        self._rows = len(rows_R)
        self._set_views()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """What transformers calls :meth:`select`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """What transformers calls :meth:`select`."""
        self.select(indices, _moved(indices))

    def reset(self) -> None:
        """Forget everything."""
        self.__init__(self.front)  # type: ignore[misc]

    def get_seq_length(self) -> int:
        """Return S."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns a mask for ``query_length`` more tokens has, and the number of its first column."""
        return self._length + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def _set_views(self) -> tuple[Tensor, Tensor]:
        end = self.front + self._length
        self.keys = self._keys[: self._rows, :, self.front : end]
        self.values = self._values[: self._rows, :, self.front : end]
        return self.keys, self.values

    def _grow(self, columns: int) -> None:
        end = self.front + self._length
        grown = [_buffer(states, self._rows, columns) for states in (self._keys, self._values)]
        for new, old in zip(grown, (self._keys, self._values), strict=True):
            held = min(end, old.shape[2])
            new[:, :, :held] = old[: self._rows, :, :held]
        self._keys, self._values = grown


class InPlaceCache(DynamicCache):
    """One :class:`InPlaceLayer` per layer of the model, made when the layer first brings its states.

    Args:
        front: P, columns that every layer keeps free for prompts.
    """

    def __init__(self, front: int = 0) -> None:
        super().__init__()
        self.front = front

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append states to a layer; see :meth:`InPlaceLayer.update`."""
        while len(self.layers) <= layer_idx:
            self.layers.append(InPlaceLayer(self.front))
        layer = self.layers[layer_idx]
        assert isinstance(layer, InPlaceLayer)
        return layer.update(key_states, value_states, *args, **kwargs)

    def holder(self, module: nn.Module, keys_BNSH: Tensor) -> InPlaceLayer | None:
        """Find the layer that handed out these keys to an attention module; ``None`` if they come from elsewhere."""
        number = getattr(module, "layer_idx", None)
        if not isinstance(number, int) or number >= len(self.layers):
            return None
        layer = self.layers[number]
        return layer if isinstance(layer, InPlaceLayer) and layer.keys is keys_BNSH else None

    def select(self, rows_R: Tensor, since: int = 0) -> None:
        """Make row i of every layer that of the present row ``rows_R[i]``; see :meth:`InPlaceLayer.select`."""
        moved_M = _moved(rows_R)
        for layer in self.layers:
            assert isinstance(layer, InPlaceLayer)
            layer.select(rows_R, moved_M, since)

    def batch_select_indices(self, indices: Tensor) -> None:
        """What transformers calls :meth:`select`."""
        self.select(indices)


def _moved(rows_R: Tensor) -> Tensor:
    return (rows_R != torch.arange(len(rows_R), device=rows_R.device)).nonzero()[:, 0]


def _buffer(like: Tensor, rows: int, columns: int) -> Tensor:
    return like.new_empty(rows, like.shape[1], columns, like.shape[3])
