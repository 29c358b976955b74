"""Where a prompt stands is kept with it, and what has no place for that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from softprompts.errors import UnsupportedModelError
from softprompts.models import FrozenLM
from softprompts.prompts import SoftPrompt, prompt_from_table
from softprompts.storage import load_prompt, read_info, save_prompt
from softprompts.storage.npy import export_npy
from softprompts.storage.peft import export_peft

KINDS = ["prefix", "embedding"]


def as_infix(prompt: SoftPrompt) -> SoftPrompt:
    return prompt_from_table(prompt.kind, prompt.geometry, prompt.table_PW, placement="infix")


@pytest.mark.parametrize("kind", KINDS)
def test_an_infix_comes_back_as_one(kind: str, make_prompt: Callable[[str], SoftPrompt], model, tmp_path: Path) -> None:
    prompt = as_infix(make_prompt(kind))
    place = save_prompt(prompt, tmp_path / "infix", frozen=model)
    loaded = load_prompt(place, model)
    assert loaded.info.placement == loaded.prompt.placement == loaded.prompt.fold().placement == "infix"
    assert loaded.prompt().infix
    assert loaded.prompt.table_PW.equal(prompt.table_PW)
    assert "between input and output" in (place / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_in_front_says_nothing_of_it(
    kind: str, make_prompt: Callable[[str], SoftPrompt], model, tmp_path: Path
) -> None:
    place = save_prompt(make_prompt(kind), tmp_path / "prefix", frozen=model)
    assert "placement" not in json.loads((place / "prompt.json").read_text(encoding="utf-8"))
    assert read_info(place).placement == "prefix"


@pytest.mark.parametrize("kind", KINDS)
def test_other_formats_have_no_place_for_it(
    kind: str, tiny_frozen: Callable[[str], FrozenLM], make_prompt: Callable[[str], SoftPrompt], tmp_path: Path
) -> None:
    prompt = as_infix(make_prompt(kind))
    with pytest.raises(UnsupportedModelError, match="infix"):
        export_peft(prompt, tmp_path / "peft", model_name="tiny")
    if kind == "embedding":
        with pytest.raises(UnsupportedModelError, match="infix"):
            export_npy(prompt, tmp_path / "prompt.npy")
