"""Who is computed in the next step: pure bookkeeping, without a tensor.

Every output waits, runs, or is gone. A step may compute a number of tokens: first the next token of every row that
goes on, then pieces of inputs that are still being read, then new inputs, in the order of arrival. Where memory for
keys and values runs out, the row that came last goes back to waiting and is computed anew later; what it has generated
so far is kept. A request whose prompt is still being loaded is overtaken and holds nobody up.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from softprompts.errors import ConfigError, LengthError, SoftPromptsError
from softprompts.inference.requests import Request
from softprompts.inference.track import LeasedPrompt, Track
from softprompts.types import PromptStates

__all__ = ["RowMemory", "Scheduler", "ServingLimits", "Work", "too_long"]


@dataclass(frozen=True)
class ServingLimits:
    """How much runs at once."""

    max_rows: int = 64
    """Outputs that run at once."""
    tokens_per_step: int = 512
    """Most tokens of one forward pass; longer inputs are read in several. At least ``max_rows``."""
    cache_bytes: int = 1 << 30
    """Most memory for keys and values of rows that run."""
    max_waiting: int = 1024
    """Outputs that may wait; what comes beyond them is refused."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            ConfigError: A number is out of its range.
        """
        if self.max_rows < 1 or self.cache_bytes < 1 or self.max_waiting < 0:
            raise ConfigError(f"{self}: expected max_rows and cache_bytes of 1 or more, max_waiting of 0 or more")
        if self.tokens_per_step < self.max_rows:
            raise ConfigError(
                f"tokens_per_step is {self.tokens_per_step}, less than max_rows {self.max_rows}: every row that "
                "goes on takes one; raise the one or lower the other"
            )


class RowMemory(Protocol):
    """Where rows keep their keys and values; :class:`softprompts.models.slots.SlotCache` is one."""

    def fits(self, length: int, row: int | None = None) -> bool:
        """Whether there is room for so many positions of a row."""
        ...

    def open(self, row: int, length: int, prompt: PromptStates | None = None) -> int:
        """Give a row its place and its prompt."""
        ...

    def ensure(self, row: int, length: int) -> None:
        """Make its place large enough."""
        ...

    def close(self, row: int) -> None:
        """Free its place."""
        ...


class Work(NamedTuple):
    """Tokens of one track that are computed in this step."""

    track: Track
    tokens: int


class Scheduler:
    """Waiting and running tracks.

    Args:
        memory: Where rows lie.
        limits: How much runs at once.
        lease: Asks for a prompt by its name.
        longest: Positions that the model has, ``None`` for any number.
        continuous: Whether rows join while others run, and inputs are read in pieces; otherwise new rows wait until
            all that run are done, and are read whole.
    """

    def __init__(
        self,
        memory: RowMemory,
        limits: ServingLimits,
        *,
        lease: Callable[[str], LeasedPrompt],
        longest: int | None = None,
        continuous: bool = True,
    ) -> None:
        self.limits = limits
        self.waiting: list[Track] = []
        self.running: list[Track] = []
        """Both in the order of arrival."""
        self.preemptions = 0
        self._memory, self._lease, self._longest, self._continuous = memory, lease, longest, continuous

    def add(self, track: Track) -> None:
        """Let a new track wait."""
        self.waiting.append(track)

    def schedule(self) -> list[Work]:
        """Decide what is computed now; slots are opened, enlarged and taken away on the way."""
        works: list[Work] = []
        before = self.preemptions
        for track in [track for track in self.running if track.missing == 1]:
            if self._has_room(track):
                works.append(Work(track, 1))
        budget = self.limits.tokens_per_step - len(works)
        for track in self.running:
            if track.missing > 1 and budget > 0:
                works.append(Work(track, min(track.missing, budget)))
                budget -= works[-1].tokens
        if self.preemptions > before or (self.running and not self._continuous):
            return works  # memory is short, or the batch is closed
        for track in self._loaded():
            if len(self.running) >= self.limits.max_rows or budget <= 0 or not self._memory.fits(track.length):
                break
            states = None if track.lease is None else track.lease.states
            track.computed = self._memory.open(track.number, track.length, states)
            self.waiting.remove(track)
            bisect.insort(self.running, track, key=_arrival)
            count = min(track.missing, budget) if self._continuous else track.missing
            works.append(Work(track, count))
            budget -= count if self._continuous else 0
        return works

    def remove(self, track: Track) -> None:
        """Forget a track that is done."""
        if track in self.running:
            self.running.remove(track)
            self._memory.close(track.number)
        else:
            self.waiting.remove(track)
        track.let_go()

    def _has_room(self, track: Track) -> bool:
        """Make room for the next token; the row that came last goes back to waiting if there is none."""
        if track not in self.running:
            return False  # it was sent back a moment ago
        while not self._memory.fits(track.length, track.number):
            last = self.running.pop()
            self._memory.close(last.number)
            last.computed = 0
            bisect.insort(self.waiting, last, key=_arrival)
            self.preemptions += 1
            if last is track:
                return False
        self._memory.ensure(track.number, track.length)
        return True

    def _loaded(self) -> Iterator[Track]:
        """Waiting tracks that could run, first come first served; the prompts of the next ones are asked for."""
        ask = True
        for track in self.waiting[: 2 * self.limits.max_rows]:
            if track.failure is not None:
                continue
            name = track.request.prompt
            if name is not None and track.lease is None and ask:
                try:
                    track.lease = self._lease(name)
                except SoftPromptsError as error:  # it was there when the request came
                    track.fail(error)
                    continue
            if track.lease is not None:
                if track.lease.error is not None:
                    track.fail(track.lease.error)
                    continue
                if not track.lease.ready:
                    # prompts of those behind it would take the room that it waits for
                    ask = ask and not track.lease.waits_for_room
                    continue
                track.prompt_length = track.lease.states.length
            elif name is not None:
                continue
            if self._longest is not None and track.length + track.options.max_tokens - track.generated > self._longest:
                track.fail(too_long(track.request, track.prompt_length, self._longest))
                continue
            yield track


def _arrival(track: Track) -> int:
    return track.number


def too_long(request: Request, prompt_length: int, longest: int) -> LengthError:
    """Say that a request does not fit.

    Args:
        request: With its input and ``max_tokens``.
        prompt_length: P.
        longest: Positions that there are.
    """
    new = request.options.max_tokens
    return LengthError(
        f"the request needs {prompt_length + len(request.ids) + new} positions: prompt {prompt_length} + input "
        f"{len(request.ids)} + max_tokens {new}, but there are {longest}; shorten the input or lower max_tokens"
    )
