"""The JSON that verbs leave behind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from softprompts.cli.output import console_for, write_json
from softprompts.errors import StorageError


@dataclass(frozen=True)
class Report:
    name: str
    scores: tuple[float, ...]
    where: Path


def test_writes_one_object_and_the_folders_on_the_way(tmp_path: Path):
    target = tmp_path / "a" / "b.json"
    write_json(target, {"report": Report("größe", (0.5, 1.0), Path("x/y")), "none": None, "yes": True})
    text = target.read_text(encoding="utf-8")
    assert json.loads(text) == {
        "report": {"name": "größe", "scores": [0.5, 1.0], "where": "x/y"},
        "none": None,
        "yes": True,
    }
    assert "größe" in text
    assert text.endswith("}\n")


def test_a_dash_is_standard_output_and_people_read_the_other(capsys: pytest.CaptureFixture[str]):
    console_for("-").print("for people")
    write_json("-", {"a": 1})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"a": 1}
    assert captured.err == "for people\n"


@pytest.mark.parametrize("target", [None, "file.json"])
def test_without_a_dash_people_read_standard_output(target: str | None, capsys: pytest.CaptureFixture[str]):
    console_for(target).print("for people")
    assert capsys.readouterr().out == "for people\n"


def test_nowhere_writes_nothing(capsys: pytest.CaptureFixture[str]):
    write_json(None, object())
    assert capsys.readouterr().out == ""


def test_numbers_of_numpy_and_torch_become_plain(tmp_path: Path):
    target = tmp_path / "x.json"
    write_json(target, {"n": np.float32(0.5), "i": np.int64(3), "t": torch.tensor([1, 2]), "set": {2, 1}})
    assert json.loads(target.read_text()) == {"n": 0.5, "i": 3, "t": [1, 2], "set": [1, 2]}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(float("-inf"))])
def test_what_json_cannot_say_is_null(value: object, tmp_path: Path):
    target = tmp_path / "x.json"
    write_json(target, {"value": value})
    assert json.loads(target.read_text()) == {"value": None}


def test_an_object_without_a_form_is_refused(tmp_path: Path):
    with pytest.raises(TypeError, match="object has no form in JSON"):
        write_json(tmp_path / "x.json", {"value": object()})


def test_a_target_that_cannot_be_written_is_our_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="after --json"):
        write_json(tmp_path / "file" / "x.json", {})
