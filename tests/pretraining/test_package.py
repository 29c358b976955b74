from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompts.errors import DataNotFoundError
from softprompts.pretraining import bundled_lm_path
from softprompts.pretraining.package import package
from softprompts.pretraining.pretrain import pretrain
from tiny_pretraining import make_recipe

NOTES = {"hardware": "a test machine", "trials": "None.", "limits": "Everything.", "license": "cc0-1.0"}


@pytest.fixture(scope="module")
def finished(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    pretrain(make_recipe(corpus_dir, folder), report=lambda line: None)
    return folder


def test_package_holds_bf16_weights_and_a_card_of_measured_values(finished: Path, tmp_path: Path) -> None:
    pairs = [{"uid": "u", "term": "order", "good": "The kitchen serves.", "bad": "Kitchen the serves."}]
    (tmp_path / "blimp.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    values = package(finished, tmp_path / "lm", notes=NOTES, blimp_path=tmp_path / "blimp.jsonl")
    weights = load_file(tmp_path / "lm" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lm")
    full = AutoModelForCausalLM.from_pretrained(finished / "final")
    ids = torch.tensor([tokenizer("The kitchen in Lima")["input_ids"]])
    assert model.dtype == torch.bfloat16
    torch.testing.assert_close(model(ids).logits.float(), full(ids).logits, rtol=0.1, atol=0.05)
    card = (tmp_path / "lm" / "README.md").read_text(encoding="utf-8")
    assert f"{values['result']['held_out']['talk']['loss']:.3f}" in card
    for expected in ("| talk | talk | plain |", "CC0", "a test machine", "BLiMP, 1 pairs", "Everything.", "order"):
        assert expected in card


def test_an_unfinished_run_is_not_packaged(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match="no finished run"):
        package(tmp_path, tmp_path / "lm", notes=NOTES)


def test_bundled_lm_is_small_and_loads() -> None:
    try:
        path = bundled_lm_path()
    except DataNotFoundError as error:
        pytest.skip(str(error))
    assert (path / "model.safetensors").stat().st_size < 40 * 2**20
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert 7e6 < model.num_parameters() < 20e6
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("U: I need a table for two. S: For what")["input_ids"]]])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    # A uniform guess would be at log(6144) = 8.7.
    assert float(loss) < 4.5
