"""How many threads compute, and that idle ones sleep."""

from __future__ import annotations

import subprocess
import sys

import pytest

from softprompts.cli import processor


@pytest.mark.parametrize(
    ("cores", "quota", "busy", "threads"),
    [(8, float("inf"), 0.0, 8), (8, float("inf"), 3.2, 5), (8, 2.0, 0.4, 2), (2, float("inf"), 2.0, 1)],
)
def test_as_many_threads_as_there_are_free_cores(monkeypatch, cores, quota, busy, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(processor.os, "sched_getaffinity", lambda _: set(range(2 * cores)), raising=False)
    monkeypatch.setattr(processor, "_siblings", lambda core: str(core // 2))  # two logical cores each
    monkeypatch.setattr(processor, "_quota", lambda: quota)
    monkeypatch.setattr(processor, "_busy_cores", lambda: busy)
    assert processor.choose_threads() == threads


def test_what_was_asked_for_comes_first(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert (processor.choose_threads(), processor.choose_threads(5)) == (3, 5)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert processor.choose_threads() >= 1


def test_waiting_is_set_without_torch_and_what_is_set_stays():
    """In a process of its own: torch must not be loaded before, and this one has it."""
    program = (
        "import os, sys; from softprompts.cli.processor import wait_passively; wait_passively(); "
        "print(os.environ['OMP_WAIT_POLICY'], os.environ['KMP_BLOCKTIME'], 'torch' in sys.modules)"
    )
    clean = {"PYTHONPATH": ":".join(sys.path)}
    for given, expected in (({}, "passive 0 False"), ({"OMP_WAIT_POLICY": "active"}, "active 0 False")):
        done = subprocess.run(
            [sys.executable, "-c", program], env={**clean, **given}, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected
