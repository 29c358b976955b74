"""The state of rows that are being continued: the text's cache, its mask, and what steers it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import Cache

from softprompts.models.attention import Steering
from softprompts.models.cache_route import select_rows
from softprompts.models.in_place import InPlaceCache

__all__ = ["DecodeState"]


@dataclass
class DecodeState:
    """Everything a batch needs to go on by one token. Owned by one decoding loop and changed in place.

    Shape letters: B rows, S text columns so far (pads included), P prompt columns.
    """

    cache: Cache
    mask_BS: Tensor
    """1 on real text tokens."""
    position_B: Tensor
    """Position of the NEXT token of each row, prompt included."""
    steering: Steering
    input_columns: int = 0
    """Columns of the text that was read at the start; the rest was generated."""

    @property
    def rows(self) -> int:
        """B."""
        return int(self.mask_BS.shape[0])

    def select(self, rows_R: Tensor) -> None:
        """Keep (and reorder, and repeat) rows: row i of the new state is row ``rows_R[i]`` of the old one.

        Finished rows are dropped with it, beams are made with it.
        """
        self._select(rows_R, 0)

    def fork(self, rows_R: Tensor) -> None:
        """Reorder rows like :meth:`select`, where each continues a row with the same prompt and input (beam search).

        Only what was generated is moved then.
        """
        self._select(rows_R, self.input_columns)

    def _select(self, rows_R: Tensor, since: int) -> None:
        if isinstance(self.cache, InPlaceCache):
            self.cache.select(rows_R, since)
        else:
            select_rows(self.cache, rows_R)
        self.position_B = self.position_B[rows_R]
        if since:
            return
        self.mask_BS = self.mask_BS[rows_R]
        self.steering = self.steering.select(rows_R)
