"""``softprompts similarity`` and ``softprompts library``: what they print, and what they give to programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softprompts.cli import loading
from softprompts.cli import main as cli
from softprompts.cli.prompt_files import labels_of
from softprompts.config import ModelConfig, PromptConfig
from softprompts.models import FrozenLM
from softprompts.prompts import build_prompt
from softprompts.storage import load_prompt, save_prompt
from softprompts.transfer.neurons import activated_neurons
from softprompts.transfer.similarity import MEASURES

Save = Callable[..., Path]


def run(*arguments: object) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    return caught.value.code


@pytest.fixture
def save(monkeypatch: pytest.MonkeyPatch, tiny_frozen: Callable[[str], FrozenLM], tmp_path: Path) -> Save:
    """Saves a prompt for a tiny model of the zoo; ``--model FAMILY`` names such a model."""

    def load(config: ModelConfig) -> FrozenLM:
        return tiny_frozen(config.name_or_path)

    def make(
        name: str, kind: str = "embedding", length: int = 4, seed: int = 0, family: str = "llama", **more: Any
    ) -> Path:
        frozen = tiny_frozen(family)
        prompt = build_prompt(PromptConfig(kind=kind, length=length), frozen, seed=seed)
        return save_prompt(prompt, tmp_path / "shelf" / name, frozen=frozen, **more)

    monkeypatch.setattr(loading, "load_frozen", load)
    monkeypatch.setenv("COLUMNS", "200")
    return make


def test_gives_every_measure_that_applies(save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    paths = [save("one", task="e2e"), save("two", seed=1), save("three", seed=2)]
    assert run("similarity", *paths, "--model", "llama", "--out", tmp_path / "out", "--json", "-") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    neurons = [f"neurons, {where}" for where in ("all layers", "layer 0", "layer 1", "layer 2")]
    assert list(report["measures"]) == [*MEASURES, *neurons]
    prompts = [load_prompt(path).prompt for path in paths]
    assert torch.allclose(torch.tensor(report["measures"]["cosine"]).double(), MEASURES.get("cosine").matrix(prompts))
    assert [prompt["label"] for prompt in report["prompts"]] == ["one", "two", "three"]
    assert report["prompts"][0]["task"] == "e2e"
    assert report["left_out"] == {}
    assert len(report["files"]) == 2 * len(report["measures"])
    assert all(Path(file).is_file() for file in report["files"])
    assert f"{report['measures']['cosine'][0][1]:.3g}" in captured.err


def test_neurons_are_those_of_the_library(save: Save, tiny_frozen: Callable[[str], FrozenLM], capsys):
    paths = [save("one"), save("two", kind="prefix", length=6, seed=1)]
    assert run("similarity", *paths, "--measure", "neurons", "--model", "llama", "--groups", 1, "--json", "-") == 0
    report = json.loads(capsys.readouterr().out)
    expected = activated_neurons([load_prompt(path).prompt for path in paths], tiny_frozen("llama")).overlap()
    assert report["measures"]["neurons, all layers"][0] == pytest.approx(expected[0].tolist())


def test_what_does_not_apply_is_left_out_with_the_reason(save: Save, capsys: pytest.CaptureFixture[str]):
    paths = [save("one"), save("two", length=5)]
    assert run("similarity", *paths, "--json", "-") == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["measures"]) == ["cosine_tokens", "euclidean_tokens"]
    assert list(report["left_out"]) == ["cosine", "euclidean"]
    assert run("similarity", *paths, "--measure", "cosine") == 2
    assert "take 'cosine_tokens'" in capsys.readouterr().err


def test_published_files_stand_beside_saved_prompts(save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    directory = save("one")
    table = load_prompt(directory).prompt.table_PW
    np.save(tmp_path / "same.npy", table.numpy())
    torch.save(-table, tmp_path / "turned.pt")
    arguments = (directory, tmp_path / "same.npy", tmp_path / "turned.pt", "--measure", "cosine")
    assert run("similarity", *arguments, "--json", "-") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["measures"]["cosine"][0] == pytest.approx([1.0, 1.0, -1.0])
    assert [prompt["label"] for prompt in report["prompts"]] == ["one", "same", "turned"]
    assert report["prompts"][1]["model"] is None


def test_many_prompts_are_shown_by_their_nearest(save: Save, capsys: pytest.CaptureFixture[str]):
    paths = [save(f"p{number}", seed=number) for number in range(14)]
    assert run("similarity", *paths, "--measure", "cosine") == 0
    out = capsys.readouterr().out
    assert "nearest" in out
    assert all(f"p{number}" in out for number in range(14))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["one"], "expected at least two"),
        (["one", "two", "--measure", "cosin"], "did you mean 'cosine'"),
        (["one", "two", "--measure", "neurons"], "name it with --model"),
        (["one", "prefix"], "convert --fold"),
        (["one", "other"], "--across-models"),
        (["one", "nowhere"], "does not exist"),
        (["one", "two", "--model", "gpt2"], "was made for"),
    ],
)
def test_mistakes_are_one_paragraph(arguments: list[str], said: str, save: Save, tmp_path: Path, capsys):
    save("one")
    save("two", seed=1)
    save("prefix", kind="prefix")
    save("other", family="mistral")
    named = [
        str(tmp_path / "shelf" / word) if word in ("one", "two", "prefix", "other", "nowhere") else word
        for word in arguments
    ]
    assert run("similarity", *named) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1


def test_labels_tell_paths_apart(tmp_path: Path):
    for name in ("a/x", "b/x", "runs/one/prompt", "c"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "sst2.npy").write_bytes(b"")
    names = ("a/x", "b/x", "runs/one/prompt", "c", "sst2.npy")
    assert labels_of([tmp_path / name for name in names]) == ["a/x", "b/x", "one/prompt", "c", "sst2"]
    assert labels_of([tmp_path / "c", tmp_path / "c"]) == ["c", "c"]


# --- library ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(save: Save, tmp_path: Path) -> Path:
    save("e2e/first", task="e2e", metrics={"bleu": 0.4})
    save("e2e/second", task="e2e", metrics={"bleu": 0.6}, seed=1)
    save("sst2", kind="prefix", task="glue_sst2", metrics={"accuracy": 0.9}, length=6)
    save("bare", seed=2)
    (save("broken") / "prompt.json").write_text("{}")
    return tmp_path / "shelf"


def names(out: str, key: str = "prompts") -> list[str]:
    return [item["name"] for item in json.loads(out)[key]]


def test_lists_what_is_there(shelf: Path, capsys: pytest.CaptureFixture[str]):
    assert run("library", shelf, "--json", "-") == 0
    captured = capsys.readouterr()
    assert names(captured.out) == ["bare", "broken", "e2e/first", "e2e/second", "sst2"]
    prompts = {item["name"]: item for item in json.loads(captured.out)["prompts"]}
    assert prompts["sst2"]["kind"] == "prefix"
    assert prompts["sst2"]["metrics"] == {"accuracy": {"value": 0.9, "stderr": None}}
    assert prompts["sst2"]["model"] == "tiny-llama"
    assert "no prompt of softprompts" in prompts["broken"]["problem"]
    assert "1 broken" in captured.err
    assert "4 prompts" in captured.err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--task", "e2e"], ["e2e/first", "e2e/second"]),
        (["--sort", "score", "--task", "e2e"], ["e2e/second", "e2e/first"]),
        (["--sort", "score", "--metric", "bleu"], ["e2e/second", "e2e/first", "bare", "broken", "sst2"]),
        (
            ["--sort", "score", "--metric", "bleu", "--lowest-first"],
            ["e2e/first", "e2e/second", "bare", "broken", "sst2"],
        ),
        (["--sort", "length"], ["bare", "e2e/first", "e2e/second", "sst2", "broken"]),
        (["--sort", "task"], ["e2e/first", "e2e/second", "sst2", "bare", "broken"]),
    ],
)
def test_sorts_and_chooses(options: list[str], expected: list[str], shelf: Path, capsys: pytest.CaptureFixture[str]):
    assert run("library", shelf, *options, "--json", "-") == 0
    assert names(capsys.readouterr().out) == expected


def test_searches_by_similarity(shelf: Path, capsys: pytest.CaptureFixture[str]):
    like = shelf / "e2e" / "second"
    assert run("library", shelf, "--search-like", like, "--measure", "cosine", "-k", 2, "--json", "-") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["found"][0]["name"] == "e2e/second"
    assert report["found"][0]["similarity"] == pytest.approx(1.0)
    assert len(report["found"]) == 2
    assert {item["name"] for item in report["left_out"]} == {"broken", "sst2"}
    assert "2 were left out" in captured.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sort", "scor"], "did you mean 'score'"),
        (["--search-like", "nowhere"], "does not exist"),
        (["--search-like", "e2e/first", "--measure", "neuron"], "unknown similarity measure"),
    ],
)
def test_mistakes_in_a_library_are_one_paragraph(options: list[str], said: str, shelf: Path, capsys, monkeypatch):
    monkeypatch.chdir(shelf)
    assert run("library", ".", *options) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1


def test_a_folder_that_is_none_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("library", tmp_path / "nowhere") == 2
    assert "is no folder" in capsys.readouterr().err
