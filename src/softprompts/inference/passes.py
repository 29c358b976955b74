"""The forward pass of one step, in two ways: rows that come and go in slots, or batches that stay together.

Shape letters: M tokens of a pass, R rows whose next token is to be chosen, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from softprompts.inference.scheduler import RowMemory, Work
from softprompts.inference.track import Track
from softprompts.models import DecodeState, FrozenLM
from softprompts.models.causal import CausalModel
from softprompts.models.causal_check import runs_in_slots
from softprompts.models.seq2seq import Seq2SeqState
from softprompts.models.slot_pass import SlotPass, Span
from softprompts.models.slots import SlotCache
from softprompts.prompted import PromptedLM
from softprompts.tasks.encode import collate
from softprompts.types import Encoded, Example, PromptStates

__all__ = ["ForwardPass", "SlotForward", "StaticForward", "forward_pass"]


class ForwardPass(Protocol):
    """Computes what a step has scheduled."""

    @property
    def memory(self) -> RowMemory:
        """Where rows keep their keys and values."""
        ...

    @property
    def continuous(self) -> bool:
        """Whether rows may join while others run."""
        ...

    def longest(self, rows: int = 1) -> int | None:
        """Most positions that each of so many rows may have at once, ``None`` for any number."""
        ...

    @property
    def load(self) -> float:
        """Share of the memory that is in use."""
        ...

    def __call__(self, works: Sequence[Work]) -> tuple[Tensor, list[Track]]:
        """Compute; returns logits ``[R, V]`` in float32 and whose they are. Tracks learn how far they are."""
        ...


def forward_pass(frozen: FrozenLM, cache_bytes: int) -> ForwardPass:
    """Choose the way that a model can be run: slots where it passes the test, batches otherwise.

    Args:
        frozen: The model.
        cache_bytes: Most memory for slots.
    """
    causal = frozen.causal
    if causal is None:
        return StaticForward(frozen)
    if causal not in _in_slots:
        _in_slots[causal] = runs_in_slots(causal, min(frozen.geometry.vocab_size, len(frozen.tokenizer)))
    return SlotForward(frozen, cache_bytes) if _in_slots[causal] else StaticForward(frozen)


_in_slots: WeakKeyDictionary[CausalModel, bool] = WeakKeyDictionary()
"""Models that were tried, and what came out: validation asks again and again."""


class SlotForward:
    """One packed row of tokens of all rows; see :mod:`softprompts.models.slots`.

    Args:
        frozen: The model.
        cache_bytes: Most memory for slots.
    """

    continuous = True

    def __init__(self, frozen: FrozenLM, cache_bytes: int) -> None:
        assert frozen.causal is not None
        self._frozen, self._causal = frozen, frozen.causal
        self.memory = SlotCache(frozen.geometry, dtype=frozen.dtype, device=frozen.device, limit_bytes=cache_bytes)

    def longest(self, rows: int = 1) -> int | None:
        """What the model was made for, or less where the memory holds less."""
        limit, room = self._frozen.geometry.max_positions, self.memory.longest(rows)
        return room if limit is None else min(limit, room)

    @property
    def load(self) -> float:
        """Share of the slots' memory that belongs to rows."""
        return self.memory.used_columns / max(1, self.memory.limit_columns)

    def __call__(self, works: Sequence[Work]) -> tuple[Tensor, list[Track]]:
        """See :class:`ForwardPass`."""
        slots = SlotPass(self.memory, [Span(work.track.number, work.track.computed, work.tokens) for work in works])
        ids: list[int] = []
        last: list[int] = []
        tracks: list[Track] = []
        for track, count in (works[number] for number in slots.order):
            start = track.computed - track.prompt_length
            ids += track.tokens[start : start + count]
            track.computed += count
            if not track.missing:
                last.append(len(ids) - 1)
                tracks.append(track)
        hidden_MD = self._causal.run_slots(torch.tensor(ids, device=self._frozen.device), slots)
        if not tracks:
            return hidden_MD.new_zeros(0, 1, dtype=torch.float32), []
        return self._frozen.head(hidden_MD if len(last) == len(ids) else hidden_MD[last]), tracks


class _NoLimit:
    """Rows of a batch lie in the cache of their batch."""

    def fits(self, length: int, row: int | None = None) -> bool:
        """Always."""
        return True

    def open(self, row: int, length: int, prompt: PromptStates | None = None) -> int:
        """Nothing is computed beforehand, but the prompt."""
        return 0 if prompt is None else prompt.length

    def ensure(self, row: int, length: int) -> None:
        """The cache grows by itself."""

    def close(self, row: int) -> None:
        """The row leaves its batch with the next pass."""


class StaticForward:
    """Batches whose rows begin together; each leaves when it is done, and none joins.

    For encoder-decoders, and for decoders that more than attention tells where rows begin.

    Args:
        frozen: The model.
    """

    continuous = False
    load = 0.0

    def __init__(self, frozen: FrozenLM) -> None:
        self._frozen, self._prompted = frozen, PromptedLM(frozen)
        self.memory = _NoLimit()
        self._rows: list[Track] = []
        self._state: DecodeState | Seq2SeqState | None = None

    def longest(self, rows: int = 1) -> int | None:
        """What the model was made for; an encoder-decoder checks its two texts itself."""
        return self._frozen.geometry.max_positions if self._frozen.pair is None else None

    def __call__(self, works: Sequence[Work]) -> tuple[Tensor, list[Track]]:
        """See :class:`ForwardPass`."""
        tracks = [work.track for work in works]
        begins = any(track not in self._rows for track in tracks)
        logits_RV = self._start(tracks) if begins else self._go_on(tracks)
        for track in tracks:
            track.computed = track.length
        return logits_RV, tracks

    def _start(self, tracks: list[Track]) -> Tensor:
        prompts: dict[int, int] = {}
        states: list[PromptStates] = []
        rows = []
        for track in tracks:
            number = -1
            if track.lease is not None:
                number = prompts.setdefault(id(track.lease.states), len(states))
                if number == len(states):
                    states.append(track.lease.states)
            ids = tuple(track.tokens)
            rows.append(Encoded(ids, len(ids), Example("", ""), number, infix_at=track.request.infix_at))
        batch = collate(rows, pad_id=self._frozen.pad_id, padding_side="left", with_labels=False)
        self._rows = tracks
        logits_RV, self._state = self._prompted.start(batch.to(self._frozen.device), states)
        return logits_RV

    def _go_on(self, tracks: list[Track]) -> Tensor:
        assert self._state is not None
        if tracks != self._rows:
            staying = torch.tensor([self._rows.index(track) for track in tracks], device=self._frozen.device)
            self._state.select(staying)
            self._rows = tracks
        tokens_R = torch.tensor([track.tokens[-1] for track in tracks], device=self._frozen.device)
        return self._prompted.step(tokens_R, self._state)
