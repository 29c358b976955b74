"""How much memory a computation takes: measured at the allocator."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import torch
from torch._C._autograd import _disable_profiler_legacy, _enable_profiler_legacy
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig

__all__ = ["peak_bytes"]

_ONE_AT_A_TIME = threading.Lock()
"""PyTorch has one profiler per process."""


def peak_bytes(step: Callable[[], object], *, device: torch.device | str = "cpu") -> int:
    """Measure the peak of the memory that is allocated during a call, beyond what was allocated before it.

    Every allocation of tensor memory counts, also those inside of kernels and of compiled code; scratch memory that
    oneDNN and MKL take from the system does not. What ``step`` returns is dropped after it was counted. Memory from
    before the call that is freed within it is not subtracted, and PyTorch may say so on standard error.

    Args:
        step: What is measured; call it once before, so that lazily made things are not part of the measurement.
        device: Where the tensors lie: ``cpu`` or a CUDA device.

    Returns:
        Bytes.
    """
    place = torch.device(device)
    if place.type == "cuda":
        torch.cuda.synchronize(place)
        torch.cuda.reset_peak_memory_stats(place)
        before = torch.cuda.memory_allocated(place)
        step()
        torch.cuda.synchronize(place)
        return int(torch.cuda.max_memory_allocated(place)) - before
    # The older of PyTorch's two profilers: it records the same allocations, and does not write lines of its own to
    # standard error at every start and stop as the newer one does.
    config = ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig())
    with _ONE_AT_A_TIME:
        _enable_profiler_legacy(config)
        try:
            step()
        finally:
            threads = _disable_profiler_legacy()
    changes: list[int] = [event.cpu_memory_usage() for event in _in_order(threads) if event.kind() == "memory_alloc"]
    return max(accumulate(changes, initial=0))


def _in_order(threads: Iterable[list[Any]]) -> list[Any]:
    """Merge the events of all threads by time."""
    events = [event for thread in threads for event in thread]
    first = events[0]
    return sorted(events, key=first.cpu_elapsed_us)  # stable, so the events of one thread keep their order
