"""How long, how many operations, how much memory: the instruments of a benchmark.

Times are taken in rounds: in every round each subject runs once, one after the other, so that whatever slows the
machine down meets all of them alike. What is reported is the median over the rounds, with the quartiles beside it.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["Spread", "flops", "interleaved", "relative_difference"]

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Spread:
    """Seconds of one subject over all rounds."""

    median: float
    lower: float
    """First quartile."""
    upper: float
    """Third quartile."""
    fastest: float
    processor: float
    """Median of the processor's seconds, all threads together: what is left where others use the machine too."""
    repeats: int

    @classmethod
    def of(cls, seconds: list[float], processor: list[float]) -> Spread:
        """Summarize; one value is its own quartiles."""
        lower, _, upper = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        return cls(statistics.median(seconds), lower, upper, min(seconds), statistics.median(processor), len(seconds))


def interleaved(
    subjects: Mapping[str, Callable[[int], object]],
    *,
    repeats: int,
    device: torch.device,
    warmup: int = 1,
    on_round: Callable[[int], object] | None = None,
) -> dict[str, Spread]:
    """Time several subjects in turns.

    Args:
        subjects: By name; each is called with the number of the round.
        repeats: Rounds that count.
        device: On CUDA the clock is read when the device is done.
        warmup: Rounds before those; they run number 0.
        on_round: Called with the number of every round that counts, before it runs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    processor: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(-warmup, repeats):
        gc.collect()
        if on_round is not None and number >= 0:
            on_round(number)
        for name, run in subjects.items():
            _wait(device)
            started, worked = time.perf_counter(), time.process_time()
            run(max(number, 0))
            _wait(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
                processor[name].append(time.process_time() - worked)
    return {name: Spread.of(seconds[name], processor[name]) for name in subjects}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flops(run: Callable[[], object]) -> int:
    """Count the floating-point operations of matrix products and attention, forward and backward.

    PyTorch's counter knows the attention kernels of GPUs; that of the CPU is counted by the same formulas, all scores
    of a causal call included, whoever calls it.
    """

    def attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(
        grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object
    ) -> int:
        return int(sdpa_backward_flop_count(grad, query, key, value))

    counter = FlopCounterMode(
        display=False, custom_mapping={_CPU_ATTENTION: attention, _CPU_ATTENTION_BACKWARD: backward}
    )
    # Per-module counts are not needed, and their hooks do not bear a backward pass within a forward pass.
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with counter:
        run()
    return int(counter.get_total_flops())


class _NoModules:
    """Stands in for PyTorch's tracker of modules: everything belongs to the whole."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, *_: object) -> None:
        """End."""


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference over the norm of the second, in float64."""
    mine, other = ours.detach().double().flatten(), theirs.detach().double().flatten()
    return float((mine - other).norm() / other.norm())
