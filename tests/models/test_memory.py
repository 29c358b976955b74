"""Memory is measured, not guessed: known sizes come out to the byte."""

from __future__ import annotations

import pytest
import torch

from softprompts.models.memory import peak_bytes

MB = 2**20


def block(megabytes: int) -> torch.Tensor:
    return torch.empty(megabytes * MB, dtype=torch.uint8)


def test_peak_is_that_of_what_lives_at_once() -> None:
    def step() -> None:
        first = block(3)
        second = block(2)  # 5 MB
        del first
        third = block(1)  # 3 MB
        del second, third

    assert peak_bytes(step) == 5 * MB


def test_memory_from_before_does_not_count() -> None:
    before = block(7)
    assert peak_bytes(lambda: before.add_(1)) < MB
    assert peak_bytes(lambda: before + 1) >= 7 * MB


def test_backward_pass_and_memory_inside_of_kernels_count() -> None:
    weight = torch.randn(256, 256)
    leaf = torch.randn(1024, 256, requires_grad=True)

    def step() -> None:
        hidden = leaf
        for _ in range(4):
            hidden = torch.tanh(hidden @ weight)
        hidden.sum().backward()
        leaf.grad = None

    assert 5 * MB <= peak_bytes(step) <= 8 * MB  # four saved activations of 1 MB, one or two at work


def test_a_failing_step_leaves_the_measurement_usable() -> None:
    def fails() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        peak_bytes(fails)
    assert peak_bytes(lambda: block(2)) == 2 * MB
