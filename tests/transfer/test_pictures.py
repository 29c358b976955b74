"""Pictures of a matrix: they are there, the same every time, and in the order of the tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from softprompts.errors import StorageError
from softprompts.transfer import pictures

LABELS = ["a1", "b1", "a2", "b2"]
MATRIX = torch.tensor([[1.0, 0.1, 0.9, 0.2], [0.1, 1.0, 0.15, 0.8], [0.9, 0.15, 1.0, 0.12], [0.2, 0.8, 0.12, 1.0]])


def labels_in(svg: Path) -> list[str]:
    texts = re.findall(r">([ab][12])</text>", svg.read_text(encoding="utf-8"))
    return texts[: len(LABELS)]


def test_prompts_that_are_alike_stand_together(tmp_path: Path):
    png, svg = pictures.save_pictures(MATRIX, LABELS, "cosine", tmp_path / "new" / "cosine")
    assert png.read_bytes().startswith(b"\x89PNG")
    order = labels_in(svg)
    assert sorted(order) == sorted(LABELS)
    assert {order[0][0], order[1][0]} in ({"a"}, {"b"})
    assert "1 - similarity" in svg.read_text(encoding="utf-8")


def test_the_same_matrix_gives_the_same_file(tmp_path: Path):
    one = pictures.save_pictures(MATRIX, LABELS, "cosine", tmp_path / "one")[1]
    two = pictures.save_pictures(MATRIX, LABELS, "cosine", tmp_path / "two")[1]
    assert one.read_bytes() == two.read_bytes()


def test_without_scipy_the_heat_map_is_drawn_in_the_order_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pictures, "draws_trees", lambda: False)
    svg = pictures.save_pictures(MATRIX, LABELS, "cosine", tmp_path / "cosine")[1]
    assert labels_in(svg) == LABELS
    assert "1 - similarity" not in svg.read_text(encoding="utf-8")


@pytest.mark.parametrize("count", [1, 2, 15])
def test_any_number_of_prompts_and_equal_ones(count: int, tmp_path: Path):
    matrix_KK = torch.ones(count, count)
    paths = pictures.save_pictures(matrix_KK, [str(number) for number in range(count)], "same", tmp_path / "same")
    assert all(path.stat().st_size > 1000 for path in paths)


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="name another folder"):
        pictures.save_pictures(MATRIX, LABELS, "cosine", tmp_path / "file" / "cosine")
