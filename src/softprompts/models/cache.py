"""The state of rows that are being continued: the text's cache, its mask, and what steers it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import DynamicCache

from softprompts.models.attention import Steering

__all__ = ["DecodeState"]


@dataclass
class DecodeState:
    """Everything a batch needs to go on by one token. Owned by one decoding loop and changed in place.

    Shape letters: B rows, S text columns so far (pads included), P prompt columns.
    """

    cache: DynamicCache
    mask_BS: Tensor
    """1 on real text tokens."""
    position_B: Tensor
    """Position of the NEXT token of each row, prompt included."""
    steering: Steering

    @property
    def rows(self) -> int:
        """B."""
        return int(self.mask_BS.shape[0])

    def select(self, rows_R: Tensor) -> None:
        """Keep (and reorder, and repeat) rows: row i of the new state is row ``rows_R[i]`` of the old one.

        Beam search reorders with it, finished rows are dropped with it.
        """
        self.cache.batch_select_indices(rows_R)
        self.mask_BS = self.mask_BS[rows_R]
        self.position_B = self.position_B[rows_R]
        steering = self.steering
        keys_values = {
            layer: (keys if keys.shape[0] == 1 else keys[rows_R], values if values.shape[0] == 1 else values[rows_R])
            for layer, (keys, values) in steering.keys_values.items()
        }
        visible = None if steering.visible_BP is None else steering.visible_BP[rows_R]
        self.steering = Steering(steering.layer_of, keys_values, visible)
