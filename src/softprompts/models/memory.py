"""How much memory a computation takes: measured at the allocator, or foretold without computing anything.

To foretell it, the computation runs on tensors that have a shape but no data (PyTorch's fake tensors), while every
tensor is counted from its making to its end. Only ids, masks and positions keep their data: what is computed, and so
the memory that it takes, depends on them alone.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import _disable_profiler_legacy, _enable_profiler_legacy
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveMemory", "kept_bytes", "peak_bytes", "weight_bytes", "without_data"]

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


def weight_bytes(*models: nn.Module) -> int:
    """Memory of all weights and buffers of models; what is shared counts once."""
    storages = {}
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def kept_bytes(forward: Callable[[], object], *, besides: Iterable[Tensor] = ()) -> int:
    """Count what a forward pass keeps for its backward pass.

    Args:
        forward: A computation with gradient.
        besides: Tensors that do not count, because they are there anyway: the weights.

    Returns:
        Bytes of all tensors that were saved; those that share memory count once. What gradient checkpointing makes
        anew in the backward pass is not among them.
    """
    there = {tensor.untyped_storage()._cdata for tensor in besides}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in there:
            kept[storage._cdata] = storage  # held, so that no other storage takes its place before all are counted
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
        total = sum(int(storage.nbytes()) for storage in kept.values())
        del result
    return total


class LiveMemory(TorchDispatchMode):
    """Counts the memory of all tensors that are made inside it, from their making to their end.

    It sees what goes through PyTorch's dispatcher, not what a kernel takes and gives back by itself. Inside of
    :func:`without_data` a number that depends on missing data reads as 1.

    Args:
        width: Tensors whose last dimension is so wide are counted apart as well: the logits, for the size of the
            vocabulary.

    Attributes:
        now: Bytes that are alive.
        peak: The most that were alive at a time.
        wide_at_peak: Those of them that are so wide.
    """

    def __init__(self, *, width: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.wide_at_peak = 0
        self._width = width
        self._wide_now = 0
        self._sizes: dict[int, tuple[int, bool]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count what it made."""
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].is_floating_point() else 1
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in given and storage._cdata not in self._sizes:
                    self._count(storage, leaf)
        return result

    def _count(self, storage: Any, tensor: Tensor) -> None:
        size, wide = storage.nbytes(), tensor.ndim > 1 and tensor.shape[-1] == self._width
        self._sizes[storage._cdata] = size, wide
        self.now += size
        self._wide_now += size if wide else 0
        if self.now > self.peak:
            self.peak, self.wide_at_peak = self.now, self._wide_now
        weakref.finalize(storage, self._forget, storage._cdata).atexit = False

    def _forget(self, key: int) -> None:
        size, wide = self._sizes.pop(key)
        self.now -= size
        self._wide_now -= size if wide else 0


@contextmanager
def without_data(*modules: nn.Module) -> Iterator[None]:
    """Take the data out of the weights of modules: what is computed with them then has shapes only, and costs nothing.

    Inside, ``module.parameters()`` are other tensors than outside. Everything is put back at the end.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    fakes: dict[int, Tensor] = {}  # weights that are tied stay tied
    for module in {inner for outer in modules for inner in outer.modules()}:
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            replaced += [(store, name, tensor) for name, tensor in store.items() if _has_weights(tensor)]
    try:
        for store, name, tensor in replaced:
            if id(tensor) not in fakes:
                fakes[id(tensor)] = mode.from_tensor(tensor, static_shapes=True)
            store[name] = fakes[id(tensor)]
        yield
    finally:
        for store, name, tensor in replaced:
            store[name] = tensor


def _has_weights(tensor: Tensor | None) -> bool:
    # Positions and masks, which some models keep as buffers, must keep their data.
    return tensor is not None and (tensor.is_floating_point() or tensor.dtype in (torch.int8, torch.uint8))
