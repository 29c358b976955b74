"""Which source tree a measurement is of."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from softprompts.bench.machine import commit_of


def git(place: Path, *words: str) -> str:
    options = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(place), *options, *words], capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package in a repository of one commit."""
    place = tmp_path / "src" / "own"
    place.mkdir(parents=True)
    (place / "__init__.py").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    return place


def test_a_commit_is_marked_where_the_package_differs(package: Path, tmp_path: Path):
    head = git(package, "rev-parse", "HEAD")[:12]
    assert commit_of(package) == head
    (tmp_path / "results.json").write_text("{}")  # what is measured may be written into the same repository
    assert commit_of(package) == head
    (package / "more.py").write_text("")
    assert commit_of(package) == f"{head}-dirty"


def test_an_installed_package_has_no_commit(package: Path, tmp_path: Path):
    elsewhere = tmp_path / "venv" / "own"
    elsewhere.mkdir(parents=True)
    (elsewhere / "__init__.py").write_text("")
    (tmp_path / ".gitignore").write_text("venv\n")
    assert commit_of(elsewhere) is None
