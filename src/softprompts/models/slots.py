"""Slots: keys and values of rows that come and go, each with its prompt in front, and attention over them.

A row's prompt and text lie side by side in its slot: column j holds position j. Slots of one size are one tensor per
layer (a bank), filled from its start: a row that leaves is replaced by the bank's last one, and a row that outgrows its
slot moves to one of twice the size. So the attention of many rows is one call of a kernel per bank, without a copy,
and what is computed for short rows does not grow with the longest one.

One forward pass is one packed row of tokens without pads: the next token of every row that goes on, and pieces of
inputs that are still being read. Linear layers never hear of rows; attention finds them here.

Shape letters: M packed tokens, R rows of a group, T tokens per row of a group, S columns, C columns of a bank, N KV
heads, A attention heads, H head size, P prompt length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from softprompts.types import Geometry, LayerKey, PromptStates

__all__ = ["Bank", "Place", "SlotCache"]

_LEAST_COLUMNS = 64
"""Columns of the smallest slot."""
_FEWEST_ROWS = 4
"""Slots that a bank begins with."""


class Place(NamedTuple):
    """Where a slot is."""

    columns: int
    """Of its bank."""
    number: int
    """Within it."""


@dataclass
class Bank:
    """Slots of one size."""

    columns: int
    rows: list[int] = field(default_factory=list)
    """Whose slot it is, in order; those behind are free."""
    capacity: int = 0
    keys: dict[LayerKey, Tensor] = field(default_factory=dict)
    """``[capacity, N, C, H]``."""
    values: dict[LayerKey, Tensor] = field(default_factory=dict)


class SlotCache:
    """Keys and values of all rows that are being continued.

    Args:
        geometry: Of the model.
        dtype: Of keys and values.
        device: Where they lie.
        limit_bytes: Most memory for slots (while a row moves, it is there twice).
    """

    def __init__(self, geometry: Geometry, *, dtype: torch.dtype, device: torch.device, limit_bytes: int) -> None:
        self.geometry, self.dtype, self.device = geometry, dtype, device
        self.limit_columns = limit_bytes // max(1, geometry.prefix_width * dtype.itemsize)
        self.used_columns = 0
        """Of slots that belong to rows."""
        self._banks: dict[int, Bank] = {}
        self._places: dict[int, Place] = {}
        self._written: dict[int, int] = {}
        self._prompts: dict[int, tuple[int, frozenset[LayerKey]]] = {}

    @staticmethod
    def columns_for(length: int) -> int:
        """Columns of the slot that a row of ``length`` positions gets."""
        return max(_LEAST_COLUMNS, 1 << (length - 1).bit_length())

    def longest(self, rows: int = 1) -> int:
        """Positions of the largest slots of which there is room for so many."""
        columns = self.limit_columns // rows
        return 1 << (columns.bit_length() - 1) if columns >= _LEAST_COLUMNS else 0

    def fits(self, length: int, row: int | None = None) -> bool:
        """Whether there is room for ``length`` positions: of a new row, or of one that is there already."""
        held = self._places[row].columns if row is not None else 0
        return self.used_columns - held + self.columns_for(length) <= self.limit_columns

    def open(self, row: int, length: int, prompt: PromptStates | None = None) -> int:
        """Give a row a slot and write its prompt there.

        Args:
            row: Its number, new.
            length: Positions that it needs for now.
            prompt: Folded.

        Returns:
            Columns that are written: P.
        """
        assert row not in self._places
        assert self.fits(length)
        bank = self._take(row, self.columns_for(length))
        P = 0 if prompt is None else prompt.length
        if prompt is not None and P:
            place = self._places[row]
            for layer, (keys, values) in prompt.keys_values.items():
                bank.keys[layer][place.number, :, :P] = keys
                bank.values[layer][place.number, :, :P] = values
        self._written[row] = P
        self._prompts[row] = (P, frozenset() if prompt is None else frozenset(prompt.keys_values))
        return P

    def ensure(self, row: int, length: int) -> None:
        """Make room for ``length`` positions of a row: it moves to a larger slot where it has to."""
        place = self._places[row]
        if length <= place.columns:
            return
        assert self.fits(length, row)
        written = self._written[row]
        bank = self._take(row, self.columns_for(length))
        index, old = self._places[row].number, self._banks[place.columns]
        for layer in bank.keys:
            bank.keys[layer][index, :, :written] = old.keys[layer][place.number, :, :written]
            bank.values[layer][index, :, :written] = old.values[layer][place.number, :, :written]
        self._drop(place, written)
        if self._allocated > self.limit_columns:
            self._give_back()

    def close(self, row: int) -> None:
        """Free a row's slot. Nothing of it stays behind: what is not finite would reach whoever comes next."""
        self._drop(self._places.pop(row), self._written.pop(row))
        del self._prompts[row]

    # -- where rows lie ----------------------------------------------------------------------------------------------

    def place(self, row: int) -> Place:
        """Where a row's slot is just now."""
        return self._places[row]

    def bank(self, columns: int) -> Bank:
        """The slots of one size."""
        return self._banks[columns]

    def written(self, row: int) -> int:
        """Columns of a row that hold keys and values."""
        return self._written[row]

    def write(self, row: int, columns: int) -> None:
        """Take note that the columns of a row in front of this one will have been written."""
        assert columns <= self._places[row].columns
        self._written[row] = columns

    def prompt(self, row: int) -> tuple[int, frozenset[LayerKey]]:
        """Length of a row's prompt and the layers that it reaches."""
        return self._prompts[row]

    def _take(self, row: int, columns: int) -> Bank:
        bank = self._banks.setdefault(columns, Bank(columns))
        if len(bank.rows) == bank.capacity:
            self._grow(bank)
        self._places[row] = Place(columns, len(bank.rows))
        bank.rows.append(row)
        self.used_columns += columns
        return bank

    def _drop(self, place: Place, written: int) -> None:
        """Free a slot and put the bank's last row there."""
        bank = self._banks[place.columns]
        last = len(bank.rows) - 1
        moved = bank.rows.pop()
        held = 0
        if place.number != last:
            bank.rows[place.number] = moved
            self._places[moved] = place
            held = self._written[moved]
        for states in (bank.keys, bank.values):
            for buffer in states.values():
                if held:
                    buffer[place.number, :, :held] = buffer[last, :, :held]
                    buffer[last, :, :held] = 0
                buffer[place.number, :, held:written] = 0
        self.used_columns -= place.columns

    def _grow(self, bank: Bank) -> None:
        """Add slots to a bank: many where there is memory for them, few where it is short."""
        wanted = max(_FEWEST_ROWS, 2 * bank.capacity)
        if self._allocated + (wanted - bank.capacity) * bank.columns > self.limit_columns:
            self._give_back(bank)
            room = (self.limit_columns - self._allocated) // bank.columns
            wanted = max(len(bank.rows) + 1, min(wanted, bank.capacity + room))
        self._allocate(bank, wanted)

    @property
    def _allocated(self) -> int:
        return sum(bank.columns * bank.capacity for bank in self._banks.values())

    def _give_back(self, but: Bank | None = None) -> None:
        """Free the slots that belong to nobody."""
        for bank in self._banks.values():
            if bank is not but and bank.capacity > len(bank.rows):
                self._allocate(bank, len(bank.rows))

    def _allocate(self, bank: Bank, capacity: int) -> None:
        rows = len(bank.rows)
        for site in self.geometry.sites:
            for states, size in ((bank.keys, site.key_size), (bank.values, site.value_size)):
                old = states.get(site.key)
                # zeros, because what is masked is multiplied by 0, and may be anything but not a number
                new = torch.zeros(capacity, site.kv_heads, bank.columns, size, dtype=self.dtype, device=self.device)
                if old is not None and rows:
                    new[:rows] = old[:rows]
                states[site.key] = new
        bank.capacity = capacity
