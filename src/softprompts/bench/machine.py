"""What a number was measured on: processor, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from softprompts import __version__
from softprompts.models import FrozenLM

__all__ = ["commit_of", "core_count", "machine", "shape"]

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")
"""Instruction sets that decide which kernels run."""
_PACKAGES = ("torch", "transformers", "peft")


def core_count() -> int:
    """Cores that this process may use; all of them where the system (macOS, Windows) does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(device: torch.device) -> dict[str, object]:
    """Describe the hardware and the software that a benchmark ran on."""
    name, flags = _processor()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": name,
        "cores": core_count(),
        "instruction_sets": flags,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "softprompts": __version__,
        "versions": {package: _version(package) for package in _PACKAGES},
        "commit": commit_of(Path(__file__).resolve().parents[1]),
    }


def shape(frozen: FrozenLM) -> dict[str, int | str | None]:
    """Describe the model that a benchmark ran on."""
    geometry = frozen.geometry
    return {
        "family": geometry.family,
        "layers": len(geometry.sites),
        "width": geometry.width,
        "vocabulary": geometry.vocab_size,
        "positions": geometry.max_positions,
        "parameters": frozen.parameter_count,
    }


def _processor() -> tuple[str, list[str]]:
    """Name of the processor and those of :data:`_FLAGS` that it has; Linux says both in one file."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return platform.processor() or platform.machine(), []
    facts: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        facts[key.strip()] = value.strip()
    known = set(facts.get("flags", facts.get("Features", "")).split())
    return facts.get("model name", platform.machine()), [flag for flag in _FLAGS if flag in known]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit_of(package: Path) -> str | None:
    """Commit of a source tree, marked where the package's files differ from it; ``None`` outside of one.

    Results that are written into the same repository meanwhile make no difference.
    """
    if not _git(package, "ls-files", "__init__.py"):  # installed, perhaps somewhere in a repository of its user
        return None
    head = _git(package, "rev-parse", "--short=12", "HEAD")
    return head + "-dirty" if head and _git(package, "status", "--porcelain", "--", ".") else head


def _git(place: Path, *words: str) -> str | None:
    try:
        found = subprocess.run(
            ["git", "-C", str(place), *words], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
