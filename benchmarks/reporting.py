"""What the benchmarks share: one softprompts command with a log, on what and of which commit, JSON beside Markdown."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run(arguments: list[str], log: Path, threads: int) -> None:
    """Run one softprompts command; its output is appended to a log."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("a") as file:
        file.write(f"$ softprompts {' '.join(arguments)}\n")
        file.flush()
        command = [sys.executable, "-m", "softprompts", *arguments]
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file, check=False).returncode
    if code:
        raise SystemExit(f"softprompts {arguments[0]} ended with {code}; see {log}")


def commit() -> str:
    """Return the commit that is checked out now."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def today() -> str:
    """Return the date as results say it."""
    return time.strftime("%Y-%m-%d")


def hardware(use: str = "") -> str:
    """Say what this machine is, and what of it was used."""
    return f"{platform.machine()}, {os.cpu_count()} cores{use and ', '}{use}"


def own_threads() -> str:
    """Say how many threads this process may use."""
    return f"{os.environ.get('OMP_NUM_THREADS', 'all')} threads"


def write_result(out: Path, content: dict[str, Any], text: str) -> None:
    """Write a result as JSON and as Markdown, print the latter.

    Args:
        out: Path without suffix.
        content: All numbers.
        text: For people; a line end is added.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    out.with_suffix(".md").write_text(text + "\n")
    print(text)
