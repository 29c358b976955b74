"""``softprompts convert``: to PEFT and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from softprompts.cli import loading
from softprompts.cli import main as cli
from softprompts.config import PromptConfig
from softprompts.models import FrozenLM
from softprompts.prompts import build_prompt
from softprompts.storage import load_prompt, save_prompt


def run(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["convert", *arguments])
    return caught.value.code


@pytest.mark.parametrize("kind", ["prefix", "embedding"])
def test_there_and_back_again(
    kind: str,
    tiny_frozen: Callable[[str], FrozenLM],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    frozen = tiny_frozen("llama")
    monkeypatch.setattr(loading, "load_frozen", lambda config: tiny_frozen(config.name_or_path))
    prompt = build_prompt(PromptConfig(kind=kind, length=4), frozen, seed=0)
    ours, theirs, back = (str(tmp_path / name) for name in ("ours", "theirs", "back"))
    save_prompt(prompt, ours, frozen=frozen)

    assert run(ours, theirs, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out) == {"format": "peft", "kind": kind, "length": 4, "directory": theirs}
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "tiny-llama"
    assert config["num_virtual_tokens"] == 4

    assert run(theirs, back) == 2
    assert "--model" in capsys.readouterr().err
    assert run(theirs, back, "--model", "llama") == 0
    assert torch.equal(load_prompt(back, frozen).prompt.table_PW, prompt.table_PW)
    assert "in the format of softprompts" in capsys.readouterr().out.replace("\n", " ")


def test_an_existing_target_is_kept(tiny_frozen: Callable[[str], FrozenLM], tmp_path: Path, capsys):
    frozen = tiny_frozen("llama")
    source = save_prompt(build_prompt(PromptConfig(length=4), frozen, seed=0), tmp_path / "p", frozen=frozen)
    assert run(str(source), str(tmp_path / "out")) == 0
    assert run(str(source), str(tmp_path / "out")) == 2
    assert "overwrite" in capsys.readouterr().err
    assert run(str(source), str(tmp_path / "out"), "--overwrite") == 0
