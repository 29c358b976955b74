"""Manners on a CPU that is shared: waiting threads sleep, and no more of them are used than there are free cores.

By default threads of OpenMP that have nothing to do spin. Where another process uses one of the cores, a forward pass
of a few milliseconds then takes seconds. What decides it is read once, when torch is loaded.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["choose_threads", "wait_passively"]

_LOOK_S = 0.15
"""How long the processor is watched."""


def wait_passively() -> None:
    """Let idle threads of OpenMP sleep. Call it before torch is imported; what the user has set stays."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("KMP_BLOCKTIME", "0")  # the same for Intel's library


def choose_threads(asked: int | None = None) -> int:
    """Choose how many threads compute: what was asked for, ``OMP_NUM_THREADS``, or as many as there are free cores.

    Args:
        asked: By the user; ``None`` leaves it to the machine.
    """
    if asked is not None:
        return asked
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    busy = _busy_cores()
    free = min(len({_siblings(core) for core in allowed}), _quota()) - busy
    return max(1, round(free))


def _siblings(core: int) -> str:
    """Names the physical core that a logical one belongs to."""
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return str(core)


def _quota() -> float:
    """Cores that a container may use."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return float("inf") if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return float("inf")


def _busy_cores() -> float:
    """Cores that others keep busy just now."""
    before = _ticks()
    if before is None:
        return 0.0
    time.sleep(_LOOK_S)
    after = _ticks()
    assert after is not None
    total = after[1] - before[1]
    return 0.0 if total <= 0 else (after[0] - before[0]) / total * (os.cpu_count() or 1)


def _ticks() -> tuple[int, int] | None:
    """Time that all cores were busy, and all of their time; ``None`` where the system does not say."""
    try:
        line = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()
    except (OSError, IndexError):
        return None
    numbers = [int(word) for word in line[1:9]]  # user, nice, system, idle, iowait, irq, softirq, steal
    idle = numbers[3] + numbers[4]
    return sum(numbers) - idle, sum(numbers)
