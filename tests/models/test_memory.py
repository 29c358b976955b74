"""Memory is measured, not guessed: known sizes come out to the byte, and what is foretold without data is measured."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from softprompts.models.memory import LiveMemory, kept_bytes, peak_bytes, weight_bytes, without_data

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


def test_tensors_that_share_memory_are_kept_once_and_weights_do_not_count() -> None:
    weight = torch.randn(256, 256)
    leaf = torch.randn(1024, 256, requires_grad=True)

    def forward() -> torch.Tensor:
        hidden = torch.tanh(leaf @ weight)  # keeps its result, 1 MB; the product keeps the weight
        return hidden.square() * hidden  # keeps the hidden states twice more, and their square, 1 MB

    assert kept_bytes(forward, besides=[weight]) == 2 * MB
    assert kept_bytes(forward) == 2 * MB + weight.nbytes


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128, bias=False), nn.LayerNorm(128))
    layers[2].weight = nn.Parameter(layers[0].weight.T)  # other parameter, same memory
    return layers


def test_weights_that_share_memory_count_once() -> None:
    assert weight_bytes(network()) == 4 * (512 * 128 + 512 + 2 * 128)
    assert weight_bytes(network(), nn.Linear(10, 10)) == 4 * (512 * 128 + 512 + 2 * 128 + 110)


def test_without_data_takes_the_memory_of_the_real_computation() -> None:
    layers = network()
    rows = torch.randn(256, 128)

    def step() -> float:
        loss = layers(rows).square().sum()
        loss.backward()
        value = float(loss.detach())  # unknown without data, and asked for all the same
        layers.zero_grad(set_to_none=True)
        return value

    before = dict(layers.named_parameters())
    with without_data(layers), LiveMemory() as foretold:
        assert step() == 1.0
    after = dict(layers.named_parameters())
    assert all(after[name] is tensor for name, tensor in before.items())
    with LiveMemory() as lived:
        assert step() != 1.0
    assert foretold.peak == lived.peak
    assert foretold.now == lived.now == 0
    assert foretold.peak == pytest.approx(peak_bytes(step), rel=0.02)


def test_weights_come_back_after_an_error() -> None:
    layers = network()
    weight = layers[0].weight
    with pytest.raises(RuntimeError), without_data(layers):
        layers(torch.randn(3, 127))
    assert layers[0].weight is weight


def test_wide_tensors_are_counted_apart() -> None:
    with LiveMemory(width=50) as live:
        logits = torch.zeros(10, 50)
        more = torch.zeros(30, 20)
        vector = torch.zeros(50)
        assert live.now == 4 * (500 + 600 + 50)
        del logits, more, vector
    assert (live.now, live.peak, live.wide_at_peak) == (0, 4 * 1150, 4 * 500)


_RESIDENT = """
import resource, sys, torch
from softprompts.models.memory import peak_bytes
weight = torch.randn(512, 512)
leaf = torch.randn(int(sys.argv[1]), 512, requires_grad=True)
def step():
    hidden = leaf
    for _ in range(20):
        hidden = torch.tanh(hidden @ weight)
    hidden.sum().backward()
    leaf.grad = None
def high():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small = leaf
leaf = leaf[:8].detach().requires_grad_()
peak_bytes(step)
leaf = small
before = high()
print(peak_bytes(step), high() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is another one elsewhere")
def test_peak_is_what_the_process_grows_by() -> None:
    """In a process of its own, whose highest resident memory nothing else has raised.

    Its malloc gives large blocks back at once; as it comes it keeps some of them, and the process grows further.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MB)}
    command = [sys.executable, "-c", _RESIDENT, "4096"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    peak, grown = (int(number) for number in run.stdout.split())
    assert peak > 150 * MB
    assert grown == pytest.approx(peak, rel=0.1)
