"""``extends``: a recipe that says only what it changes in another one."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from softprompts.config import load_recipe
from softprompts.config.merging import flat, merged, nested
from softprompts.errors import ConfigError, DataNotFoundError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    names: tuple[str, ...] = ()
    table: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Outer:
    count: int = 0
    inner: Inner = field(default_factory=Inner)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_sections_are_merged_and_lists_replaced(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "count: 1\ninner: {rate: 2, names: [a, b], table: {x: 1, y: 2}}\n")
    write(tmp_path / "sub" / "middle.yaml", "extends: ../base.yaml\ninner: {names: [c], table: {y: 3}}\n")
    last = write(tmp_path / "sub" / "last.yaml", "extends: middle.yaml\ncount: 5\n")
    assert load_recipe(last, Outer) == Outer(5, Inner(2.0, ("c",), {"x": 1, "y": 3}))
    assert load_recipe(last, Outer, ["inner.rate=7"]).inner == Inner(7.0, ("c",), {"x": 1, "y": 3})


def test_a_section_without_keys_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "count: 1\ninner: {rate: 2, names: [a]}\n")
    last = write(tmp_path / "last.yaml", "extends: base.yaml\ninner:\n  # rate: 3\n")
    assert load_recipe(last, Outer) == Outer(1, Inner(2.0, ("a",)))


def test_merging_leaves_both_sides_as_they_were() -> None:
    below = {"a": {"x": 1, "y": {"z": 2}}, "b": [1, 2], "c": 3, "d": {"e": 4}, "f": 5}
    above = {"a": {"y": {"z": 9, "new": 0}}, "b": [7], "c": None, "d": None, "f": {"g": 6}, "h": {"i": 8}}
    kept = copy.deepcopy((below, above))
    assert merged(below, above) == {
        "a": {"x": 1, "y": {"z": 9, "new": 0}},
        "b": [7],
        "c": None,
        "d": {"e": 4},
        "f": {"g": 6},
        "h": {"i": 8},
    }
    assert (below, above) == kept
    assert merged(below, {"d": 1})["d"] == 1  # a value where a section stood is for the reader to refuse


def test_dotted_keys_and_sections_are_two_ways_to_write_the_same() -> None:
    sections = {"a": 1, "b": {"c": None, "d": {"e": [1, {"f": 2}]}}}
    assert flat(sections) == {"a": 1, "b.c": None, "b.d.e": [1, {"f": 2}]}
    assert nested(flat(sections)) == sections


def test_wrong_keys_are_refused_wherever_they_stand(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "inner: {rat: 2}\n")
    last = write(tmp_path / "last.yaml", "extends: base.yaml\n")
    with pytest.raises(ConfigError, match=r"unknown key 'inner.rat': did you mean 'rate'"):
        load_recipe(last, Outer)
    write(last, "extend: base.yaml\n")
    with pytest.raises(ConfigError, match="unknown key 'extend'"):
        load_recipe(last, Outer)
    write(last, "extends: [base.yaml]\n")
    with pytest.raises(ConfigError, match="expected the path of another recipe"):
        load_recipe(last, Outer)


def test_cycles_and_missing_files_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "first.yaml", "extends: second.yaml\n")
    write(tmp_path / "second.yaml", "extends: first.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load_recipe(first, Outer)
    write(first, "extends: gone.yaml\n")
    with pytest.raises(DataNotFoundError, match=r"first\.yaml' extends"):
        load_recipe(first, Outer)
