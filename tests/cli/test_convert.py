"""``softprompts convert``: to PEFT and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from softprompts.cli import loading
from softprompts.cli import main as cli
from softprompts.config import PromptConfig
from softprompts.models import FrozenLM
from softprompts.prompted import PromptedLM
from softprompts.prompts import build_prompt
from softprompts.storage import load_prompt, save_prompt
from softprompts.types import Batch


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
    assert json.loads(capsys.readouterr().out) == {"format": "peft", "kind": kind, "length": 4, "target": theirs}
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "tiny-llama"
    assert config["num_virtual_tokens"] == 4

    assert run(theirs, back) == 2
    assert "--model" in capsys.readouterr().err
    assert run(theirs, back, "--model", "llama") == 0
    assert torch.equal(load_prompt(back, frozen).prompt.table_PW, prompt.table_PW)
    assert "in the format native" in capsys.readouterr().out.replace("\n", " ")


def test_an_existing_target_is_kept(tiny_frozen: Callable[[str], FrozenLM], tmp_path: Path, capsys):
    frozen = tiny_frozen("llama")
    source = save_prompt(build_prompt(PromptConfig(length=4), frozen, seed=0), tmp_path / "p", frozen=frozen)
    assert run(str(source), str(tmp_path / "out")) == 0
    assert run(str(source), str(tmp_path / "out")) == 2
    assert "overwrite" in capsys.readouterr().err
    assert run(str(source), str(tmp_path / "out"), "--overwrite") == 0


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch, tiny_frozen: Callable[[str], FrozenLM]) -> Callable[[str], FrozenLM]:
    """``--model FAMILY`` names a tiny model of the zoo."""
    monkeypatch.setattr(loading, "load_frozen", lambda config: tiny_frozen(config.name_or_path))
    monkeypatch.setenv("COLUMNS", "200")
    return tiny_frozen


def test_a_plain_array_without_its_model(models, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    published, ours, back = (str(tmp_path / name) for name in ("in.npy", "ours", "back.npy"))
    table_PD = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    np.save(published, table_PD)
    assert run(published, ours) == 0
    assert "only the width 32 is checked" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["inspect", ours, "--json", str(tmp_path / "inspect.json")])
    said = json.loads((tmp_path / "inspect.json").read_text(encoding="utf-8"))
    assert {said["model"][name] for name in ("name", "fingerprint", "tokenizer_fingerprint", "family")} == {None}
    assert (said["width"], said["source"]) == (32, "in.npy")
    assert "not on record" in capsys.readouterr().out

    assert run(ours, back) == 0
    assert (tmp_path / "back.npy").read_bytes() == (tmp_path / "in.npy").read_bytes()
    assert run(ours, str(tmp_path / "theirs"), "--to", "peft") == 2
    assert "bind the prompt to its model" in capsys.readouterr().err
    assert run(ours, str(tmp_path / "again"), "--to", "native") == 2
    assert "--model" in capsys.readouterr().err
    assert run(ours, str(tmp_path / "bound"), "--to", "native", "--model", "gpt2") == 0
    info = load_prompt(tmp_path / "bound", models("gpt2")).info
    assert (info.model.name, info.origin.source) == ("tiny-gpt2", "in.npy")


def test_a_folded_prompt_gives_the_same_logits(models, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    frozen = models("llama")
    prompt = build_prompt(PromptConfig(kind="embedding", length=4), frozen, seed=0)
    ours = save_prompt(prompt, tmp_path / "ours", frozen=frozen, task="e2e", metrics={"bleu": 0.5}, seed=7)
    assert run(str(ours), str(tmp_path / "folded"), "--fold") == 2
    assert "--model" in capsys.readouterr().err
    assert run(str(ours), str(tmp_path / "folded"), "--fold", "--model", "llama") == 0
    loaded = load_prompt(tmp_path / "folded", frozen)
    assert (loaded.prompt.kind, loaded.info.origin.task, loaded.info.origin.seed) == ("prefix", "e2e", 7)
    ids_BT = torch.tensor([[72, 105, 32, 116]])
    labels_BT = ids_BT.masked_fill(torch.arange(4) == 0, -100)
    batch = Batch(ids_BT, torch.ones_like(ids_BT), labels_BT, torch.zeros(1, dtype=torch.long))
    with torch.no_grad():
        logits = [PromptedLM(frozen, [each]).label_logits(batch).logits_MV for each in (prompt, loaded.prompt)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    assert run(str(tmp_path / "folded"), str(tmp_path / "twice"), "--fold", "--model", "llama") == 2
    assert "folded already" in capsys.readouterr().err
    assert run(str(tmp_path / "folded"), str(tmp_path / "x.npy")) == 2
    assert "no place for layers" in capsys.readouterr().err


def test_formats_and_tasks_are_named(models, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    frozen = models("gpt2")
    source = save_prompt(build_prompt(PromptConfig(length=4), frozen, seed=0), tmp_path / "p", frozen=frozen)
    assert run(str(source), str(tmp_path / "c"), "--to", "cartridge", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["format"] == "cartridge"
    assert json.loads((tmp_path / "c" / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"] == "CARTRIDGE"
    assert run(str(source), str(tmp_path / "t"), "--task", "0") == 2
    assert "multitask" in capsys.readouterr().err
    assert run(str(tmp_path / "c"), str(tmp_path / "t"), "--task", "0", "--model", "gpt2") == 2
    assert "no multitask prompt" in capsys.readouterr().err
