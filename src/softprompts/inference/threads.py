"""How many threads compute a forward pass: measured on the model itself, for passes of few tokens and of many.

A step that writes the next token of some rows is hundreds of small products. Between any two of them the threads wait
for each other, which may take longer than what a second thread saves; a pass that reads inputs wants all threads. Where
the one turns into the other depends on model, processor and how threads wait, so it is tried: rows that nobody asked
for are computed with one thread, with two, four, ... and with all of them.

The number is set for a pass and set back behind it. It belongs to the thread that sets it, but a thread that computes
for the first time just then begins with it too: one that lives long should set its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations_with_replacement, pairwise, product
from math import inf, isqrt
from statistics import median

import torch

from softprompts.inference.choosing import choose
from softprompts.inference.passes import SlotForward, forward_pass
from softprompts.inference.requests import Request
from softprompts.inference.scheduler import ServingLimits, Work
from softprompts.inference.track import Track
from softprompts.models import FrozenLM

__all__ = ["ThreadPlan", "computing", "measure_threads", "plan_threads"]

_SIZES = (1, 8, 32, 128, 512)
"""Tokens of the passes that are timed."""
_COLUMN = 128
"""Positions of the rows whose next token is computed: prompt, input and some output."""
_ROUNDS = (3, 9)
"""Fewest and most passes of one size with one number of threads, after one that does not count."""
_ENOUGH_S = 0.25
"""When the passes of one size have taken so long, the fewest will do."""
_WORTH = 1.1
"""What the next larger number of threads has to gain: less is noise, and others want to compute, too."""


@dataclass(frozen=True)
class ThreadPlan:
    """How many threads compute a pass."""

    most: int
    """Of passes that are larger than all :attr:`steps`."""
    steps: tuple[tuple[int, int], ...] = ()
    """``(tokens, threads)``, ascending: so many threads for passes of up to so many tokens."""

    def threads(self, tokens: int) -> int:
        """Number of threads for a pass of so many tokens."""
        return next((threads for bound, threads in self.steps if tokens <= bound), self.most)

    @property
    def numbers(self) -> list[int]:
        """All numbers of threads that occur, ascending."""
        return sorted({self.most, *(threads for _, threads in self.steps)})

    def __str__(self) -> str:
        """For people."""
        if not self.steps:
            return _count(self.most)
        (bound, first), *others = self.steps
        parts = [f"{_count(first)} up to {bound} tokens a pass"]
        parts += [f"{threads} up to {bound}" for bound, threads in others]
        return ", ".join([*parts, f"{self.most} above"])


@contextmanager
def computing(plan: ThreadPlan | None, tokens: int) -> Iterator[None]:
    """Compute a pass of so many tokens with as many threads as the plan says, and set the number back.

    Args:
        plan: ``None`` leaves the number as it is.
        tokens: Of the pass.
    """
    before = torch.get_num_threads()
    wanted = before if plan is None else plan.threads(tokens)
    if wanted == before:
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def plan_threads(seconds: Mapping[int, Mapping[int, float]], most: int) -> ThreadPlan:
    """Choose the fastest number of threads for every size of a pass, never fewer for a larger one.

    A pass is treated like the measured size that is nearest to it, by ratio. Single times may be off; so what counts is
    the time that all sizes lose together, each relative to its own best.

    Args:
        seconds: By tokens of a pass, then by threads; a size that nobody measured has none.
        most: Threads of sizes that nobody measured.
    """
    sizes = sorted(seconds)
    times = [seconds[size] or {most: 1.0} for size in sizes]
    numbers = sorted({most}.union(*times))
    weight = {number: _WORTH**place for place, number in enumerate(numbers)}

    def cost(choice: Sequence[int]) -> float:
        lost = 0.0
        for of, number in zip(times, choice, strict=True):
            weighted = {some: spent * weight[some] for some, spent in of.items()}
            lost += weighted.get(number, inf) / min(weighted.values())
        return lost

    chosen = min(combinations_with_replacement(numbers, len(sizes)), key=cost)  # fewer threads come first
    bounds = [isqrt(size * larger) for size, larger in pairwise(sizes)]
    steps = [(bound, a) for bound, (a, b) in zip(bounds, pairwise(chosen), strict=True) if a != b]
    return ThreadPlan(chosen[-1] if chosen else most, tuple(steps))


@torch.no_grad()
def measure_threads(
    frozen: FrozenLM,
    limits: ServingLimits | None = None,
    *,
    budget_s: float = 2.0,
    clock: Callable[[], float] = time.perf_counter,
) -> ThreadPlan:
    """Time passes as :class:`ServingEngine` computes them, and plan. Nobody else should compute meanwhile.

    All threads are kept on other devices than the CPU, for models that do not run in slots, and for those sizes of
    passes for which the time is over.

    Args:
        frozen: The model.
        limits: Of the engine.
        budget_s: Most time, but for the pass that is running then.
        clock: Seconds.

    Returns:
        For numbers of threads up to the one that torch is set to.
    """
    most = torch.get_num_threads()
    limits = limits or ServingLimits()
    if most == 1 or frozen.device.type != "cpu":
        return ThreadPlan(most)
    forward = forward_pass(frozen, limits.cache_bytes)
    if not isinstance(forward, SlotForward) or not forward.longest():
        return ThreadPlan(most)
    numbers = [1 << power for power in range((most - 1).bit_length())] + [most]
    sizes = sorted({size for size in (*_SIZES, limits.max_rows) if size <= limits.tokens_per_step})
    seconds: dict[int, Mapping[int, float]] = {}
    deadline = clock() + budget_s
    for size in sizes:
        seconds[size] = _times(forward, _tracks(forward, frozen, size, limits.max_rows), numbers, deadline, clock)
    return plan_threads(seconds, most)


def _tracks(forward: SlotForward, frozen: FrozenLM, tokens: int, max_rows: int) -> list[Track]:
    """Rows with so many tokens to compute: the next one of each, or pieces of inputs where there are not so many rows.

    Returns:
        No rows where the memory does not hold them.
    """
    longest = forward.longest()
    assert longest  # rows in slots have a limit, and this one holds something
    column = min(_COLUMN, longest)
    if tokens <= max_rows and (forward.longest(tokens) or 0) >= column:
        texts = [(column, 1)] * tokens
    else:
        texts = [(min(longest, tokens - first),) * 2 for first in range(0, tokens, longest)]
    tracks: list[Track] = []
    for number, (length, missing) in enumerate(texts):
        if not forward.memory.fits(length):
            _close(forward, tracks)
            return []
        track = Track(number, Request("", (0,) * length), 0, seed=0, tokenizer=frozen.tokenizer)
        forward.memory.open(number, length)
        track.computed = length - missing
        tracks.append(track)
    return tracks


def _times(
    forward: SlotForward, tracks: list[Track], numbers: list[int], deadline: float, clock: Callable[[], float]
) -> dict[int, float]:
    """Median seconds of a pass by number of threads; none where there are no rows, or the time is over too early."""
    if not tracks:
        return {}
    works = [Work(track, track.missing) for track in tracks]
    fewest, rounds = _ROUNDS
    taken: dict[int, list[float]] = {number: [] for number in numbers}
    started = clock()
    try:
        for turn, number in product(
            range(-1, rounds), numbers
        ):  # in turns: what slows the machine down meets all alike
            if clock() > deadline or (turn >= fewest and clock() - started > _ENOUGH_S):
                break
            spent = _seconds(forward, works, number, clock)
            if turn >= 0:
                taken[number].append(spent)
    finally:
        _close(forward, tracks)
    return {number: median(times) for number, times in taken.items()} if all(taken.values()) else {}


def _seconds(forward: SlotForward, works: list[Work], number: int, clock: Callable[[], float]) -> float:
    """Time of one pass and of choosing what comes next; it can be computed again afterwards."""
    with computing(ThreadPlan(number), 1):
        began = clock()
        choose(*forward(works), frozenset())
        spent = clock() - began
    for track, tokens in works:
        track.computed -= tokens
    return spent


def _close(forward: SlotForward, tracks: list[Track]) -> None:
    for track in tracks:
        forward.memory.close(track.number)


def _count(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"
