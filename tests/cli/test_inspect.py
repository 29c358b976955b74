"""``softprompts inspect``: what it prints, and what it gives to programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompts.cli import loading
from softprompts.cli import main as cli
from softprompts.config import ModelConfig, PromptConfig
from softprompts.models import FrozenLM
from softprompts.prompts import build_prompt
from softprompts.storage import save_prompt
from softprompts.types import MetricValue


def run(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["inspect", *arguments])
    return caught.value.code


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch, tiny_frozen: Callable[[str], FrozenLM]) -> Callable[[str], FrozenLM]:
    """``--model FAMILY`` names a tiny model of the zoo."""

    def load(config: ModelConfig) -> FrozenLM:
        return tiny_frozen(config.name_or_path)

    monkeypatch.setattr(loading, "load_frozen", load)
    monkeypatch.setenv("COLUMNS", "200")
    return tiny_frozen


@pytest.fixture
def saved(models: Callable[[str], FrozenLM], tmp_path: Path) -> Callable[..., Path]:
    def save(kind: str, **metadata: Any) -> Path:
        frozen = models("llama")
        config = PromptConfig(kind=kind, length=4)
        return save_prompt(build_prompt(config, frozen, seed=0), tmp_path / kind, frozen=frozen, **metadata)

    return save


@pytest.mark.parametrize("kind", ["prefix", "embedding"])
def test_says_what_a_prompt_is(kind: str, saved: Callable[..., Path], models, capsys: pytest.CaptureFixture[str]):
    directory = saved(kind, task="e2e", seed=7, metrics={"bleu": MetricValue(0.6789, 0.0042)})
    assert run(str(directory)) == 0
    out = capsys.readouterr().out
    frozen = models("llama")
    stored = 4 * (frozen.geometry.prefix_width if kind == "prefix" else frozen.geometry.width)
    size = sum(path.stat().st_size for path in directory.iterdir())
    for said in (kind, f"{stored} stored", f"{size / 1000:.1f} kB", "tiny-llama", frozen.fingerprint, "e2e", "0.6789"):
        assert said in out
    assert ("self.2" in out) == (kind == "prefix")
    assert ("no embeddings" in out) == (kind == "prefix")


@pytest.mark.parametrize("kind", ["prefix", "embedding"])
def test_the_json_holds_it_all(kind: str, saved: Callable[..., Path], models, capsys: pytest.CaptureFixture[str]):
    directory = saved(kind, task="e2e", recipe={"training": {"seed": 7}}, metrics={"bleu": MetricValue(0.5, 0.01)})
    assert run(str(directory), "--model", "llama", "--words", "3", "--json", "-") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert "tiny-llama" in captured.err
    frozen = models("llama")
    assert report["kind"] == kind
    assert report["length"] == 4
    assert report["seed"] == 7
    assert report["recipe"] == {"training": {"seed": 7}}
    assert report["metrics"] == {"bleu": {"value": 0.5, "stderr": 0.01}}
    assert report["matches_model"] is True
    parameters = sum(parameter.numel() for parameter in frozen.model.parameters())
    assert report["share_of_model"] == pytest.approx(report["parameters"]["stored"] / parameters)
    assert len(report["norms_of_positions"]) == 4
    assert len(report["norms_of_layers"]) == (3 if kind == "prefix" else 0)
    if kind == "prefix":
        assert report["nearest_words"] is None
    else:
        assert [len(position) for position in report["nearest_words"]] == [3] * 4


def test_a_fresh_prompt_of_words_shows_those_words(saved: Callable[..., Path], capsys: pytest.CaptureFixture[str]):
    assert run(str(saved("embedding")), "--model", "llama") == 0
    # The initializer takes words of the vocabulary, so every vector still is one.
    assert capsys.readouterr().out.count(" 1.00") >= 4


def test_another_model_is_named_and_no_error(saved: Callable[..., Path], capsys: pytest.CaptureFixture[str]):
    assert run(str(saved("embedding")), "--model", "gpt2", "--json", "-") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["matches_model"] is False
    assert "family llama, this model gpt2" in report["mismatch"]


def test_without_a_model_there_is_no_share(saved: Callable[..., Path], tmp_path: Path):
    assert run(str(saved("embedding")), "--json", str(tmp_path / "out.json")) == 0
    report = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert report["share_of_model"] is report["matches_model"] is report["nearest_words"] is None


def test_names_are_no_markup(saved: Callable[..., Path], capsys: pytest.CaptureFixture[str]):
    assert run(str(saved("prefix", task="[red]e2e[/]", metrics={"[b]m": 1.0}))) == 0
    out = capsys.readouterr().out
    assert "[red]e2e[/]" in out
    assert "[b]m" in out


def test_a_damaged_prompt_is_one_paragraph_and_exit_code_2(
    saved: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    directory = saved("prefix")
    torch.save({}, directory / "prompt.safetensors")
    assert run(str(directory)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "never loaded" in captured.err
    assert captured.err.count("\n") == 1
