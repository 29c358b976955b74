"""Plain arrays: in and out bit for bit, and nothing claimed that such a file does not say."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from softprompts.errors import ArtifactError, PromptMismatchError, StorageError, UnsupportedModelError
from softprompts.prompted import PromptedLM
from softprompts.storage import load_prompt, read_info, save_prompt
from softprompts.storage.match import unknown_model
from softprompts.storage.npy import export_npy, import_npy

DATA = Path(os.environ.get("SOFTPROMPTS_DATA", "nowhere"))


def write(path: Path, dtype: str = "float32", shape: tuple[int, ...] = (5, 12), order: str = "C") -> Path:
    array = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    np.save(path, np.asarray(array, order=order))
    return path


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_through_our_format_and_out_again_bit_for_bit(dtype: str, tmp_path: Path):
    path = write(tmp_path / "in.npy", dtype)
    prompt = import_npy(path)
    assert (prompt.kind, prompt.length, prompt.geometry.width) == ("embedding", 5, 12)
    saved = save_prompt(prompt, tmp_path / "p", frozen=unknown_model(12), source="in.npy", dtype=dtype)
    loaded = load_prompt(saved)
    out = export_npy(loaded.prompt, tmp_path / "out.npy", dtype=loaded.info.dtype)
    assert out.read_bytes() == path.read_bytes()


@pytest.mark.data
@pytest.mark.parametrize("task", ["sst2", "mrpc", "rte"])
def test_the_published_prompts_come_out_bit_for_bit(task: str, tmp_path: Path):
    path = DATA / "trained_prompts" / "google_t5_1_1_lm100k_base" / f"{task}.npy"
    if not path.is_file():
        pytest.skip("no published prompts below SOFTPROMPTS_DATA")
    prompt = import_npy(path)
    assert prompt.table_PW.shape == (100, 768)
    saved = save_prompt(prompt, tmp_path / "p", frozen=unknown_model(768), source=path.name)
    assert export_npy(load_prompt(saved).prompt, tmp_path / "out.npy").read_bytes() == path.read_bytes()


def test_the_manifest_says_what_is_not_known(tmp_path: Path):
    saved = save_prompt(
        import_npy(write(tmp_path / "in.npy")), tmp_path / "p", frozen=unknown_model(12), source="in.npy"
    )
    said = json.loads((saved / "prompt.json").read_text(encoding="utf-8"))
    assert said["geometry"] == {"family": None, "width": 12, "vocab_size": None, "max_positions": None, "sites": None}
    assert set(said["model"].values()) == {None}
    info = read_info(saved)
    assert info.origin.source == "in.npy"
    assert set(info.unknown) == {
        *(f"geometry.{name}" for name in ("family", "vocab_size", "max_positions", "sites")),
        *(f"model.{name}" for name in ("name", "fingerprint", "tokenizer_fingerprint")),
    }
    card = (saved / "README.md").read_text(encoding="utf-8")
    assert "only the width is known" in card
    assert "imported from" in card


def test_a_model_of_its_width_carries_it(tiny_frozen, tmp_path: Path, model):
    frozen = tiny_frozen("llama")
    path = write(tmp_path / "in.npy", shape=(4, frozen.geometry.width))
    saved = save_prompt(import_npy(path), tmp_path / "p", frozen=unknown_model(frozen.geometry.width))
    loaded = load_prompt(saved, frozen)
    assert loaded.prompt.geometry == frozen.geometry
    assert PromptedLM(frozen, [loaded.prompt]).prompts[0] is loaded.prompt
    for allowed in (False, True):
        with pytest.raises(PromptMismatchError, match=r"not on record.*width 32, this model 12"):
            load_prompt(saved, model, allow_other_model=allowed)
    assert import_npy(path, frozen).geometry == frozen.geometry
    with pytest.raises(PromptMismatchError, match="width 32, 'tiny-llama' has 12"):
        import_npy(path, model)


def test_a_known_model_has_nothing_unknown(saved: Path):
    assert read_info(saved).unknown == ()


def test_a_prefix_needs_a_known_model(make_prompt, tmp_path: Path, model):
    nothing = replace(model, geometry=replace(model.geometry, vocab_size=0, max_positions=None))
    prompt = make_prompt("prefix")
    prompt.geometry = nothing.geometry
    with pytest.raises(ArtifactError, match="only the width is known"):
        save_prompt(prompt, tmp_path / "p", frozen=nothing)


def test_float64_is_rounded_and_fortran_order_is_read(tmp_path: Path):
    path = write(tmp_path / "in.npy", "float64", order="F")
    expected = torch.from_numpy(np.load(path)).float()
    assert torch.equal(import_npy(path).table_PW, expected)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros(5, np.float32), "expected floating-point numbers"),
        (np.zeros((2, 3, 4), np.float32), "expected floating-point numbers"),
        (np.zeros((0, 4), np.float32), "expected floating-point numbers"),
        (np.zeros((2, 4), np.int64), "holds int64"),
        (np.array([[np.nan, 1.0]], np.float32), "not finite"),
        (np.array([[1e300, 1.0]]), "not finite"),
        (np.array([["a", None]], dtype=object), "no plain NumPy array"),
    ],
)
def test_other_arrays_are_refused(array, said: str, tmp_path: Path):
    np.save(tmp_path / "in.npy", array, allow_pickle=True)
    with pytest.raises(ArtifactError, match=said):
        import_npy(tmp_path / "in.npy")


def test_damage_is_noticed_and_nothing_is_unpickled(tmp_path: Path):
    path = write(tmp_path / "in.npy")
    whole = path.read_bytes()
    for content in (b"", whole[:40], whole[:-1], pickle.dumps([1.0])):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match="no plain NumPy array"):
            import_npy(path)
    with path.open("wb") as file:
        np.savez(file, a=np.zeros((2, 2), np.float32))
    with pytest.raises(ArtifactError, match="an archive of arrays"):
        import_npy(path)
    with pytest.raises(ArtifactError, match="missing"):
        import_npy(tmp_path / "nowhere.npy")


def test_writing_replaces_only_when_asked(make_prompt, tmp_path: Path):
    path = write(tmp_path / "out.npy")
    before = path.read_bytes()
    with pytest.raises(StorageError, match="overwrite"):
        export_npy(make_prompt("embedding"), path)
    with pytest.raises(UnsupportedModelError, match="no place for layers"):
        export_npy(make_prompt("prefix"), path, overwrite=True)
    with pytest.raises(StorageError, match=r"does not end in \.npy"):
        export_npy(make_prompt("embedding"), tmp_path / "out")
    assert path.read_bytes() == before
    export_npy(make_prompt("embedding"), path, overwrite=True)
    assert torch.equal(import_npy(path).table_PW, make_prompt("embedding").table_PW)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.npy"]
