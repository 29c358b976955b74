"""PEFT's files: what we export gives our logits there, what PEFT saved gives its logits here."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from softprompts.config import PromptConfig
from softprompts.errors import ArtifactError, PromptMismatchError, StorageError, UnsupportedModelError
from softprompts.models import FrozenLM
from softprompts.prompted import PromptedLM
from softprompts.prompts import SoftPrompt, build_prompt
from softprompts.storage.peft import export_peft, import_peft
from softprompts.types import Batch

peft = pytest.importorskip("peft")

FAMILIES = ["gpt2", "llama", "qwen3", "gemma3", "mistral", "opt", "gpt_neox", "phi"]
IDS = torch.tensor([[72, 105, 32, 116, 104, 101, 114, 101]])

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


def plain_copy(frozen: FrozenLM) -> torch.nn.Module:
    """The same weights in a model that our attention does not reach."""
    model = copy.deepcopy(frozen.model)
    model.set_attn_implementation("eager")
    return model


def our_logits(frozen: FrozenLM, prompt: SoftPrompt) -> Tensor:
    labels = IDS.clone()
    labels[:, 0] = -100
    batch = Batch(IDS, torch.ones_like(IDS), labels, torch.zeros(1, dtype=torch.long))
    with torch.no_grad():
        return PromptedLM(frozen, [prompt]).label_logits(batch).logits_MV


def peft_logits(model: torch.nn.Module, length: int) -> Tensor:
    with torch.no_grad():
        logits_TV = model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[0]
    skip = logits_TV.shape[0] - IDS.shape[1]
    assert skip in (0, length)
    return logits_TV[skip:-1].float()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["prefix", "embedding"])
def test_what_we_export_gives_our_logits_in_peft(
    family: str, kind: str, tiny_frozen: Callable[..., FrozenLM], tmp_path
):
    frozen = tiny_frozen(family)
    prompt = build_prompt(PromptConfig(kind=kind, length=5), frozen, seed=1)
    directory = export_peft(prompt, tmp_path / "out", model_name="base")
    wrapped = peft.PeftModel.from_pretrained(plain_copy(frozen), directory)
    torch.testing.assert_close(peft_logits(wrapped, 5), our_logits(frozen, prompt), rtol=2e-4, atol=2e-4)
    with_other = our_logits(frozen, build_prompt(PromptConfig(kind=kind, length=5), frozen, seed=2))
    assert (with_other - our_logits(frozen, prompt)).abs().max() > 1e-2  # the prompt matters
    assert torch.equal(import_peft(directory, frozen).table_PW, prompt.table_PW)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["prompt", "prefix", "prefix with projection", "cartridge", "p-tuning"])
def test_what_peft_saved_gives_its_logits_here(
    family: str, method: str, tiny_frozen: Callable[..., FrozenLM], tmp_path
):
    frozen = tiny_frozen(family)
    site = frozen.geometry.sites[0]
    shared = {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 5,
        "num_layers": len(frozen.geometry.sites),
        "num_attention_heads": site.kv_heads,
    }
    if method.startswith("prefix"):
        projection = {"prefix_projection": True, "encoder_hidden_size": 8} if "projection" in method else {}
        config = peft.PrefixTuningConfig(**shared, token_dim=site.kv_heads * site.key_size, **projection)
    elif method == "cartridge":
        config = peft.CartridgeConfig(**shared, token_dim=site.kv_heads * site.key_size, num_frozen_tokens=1)
    else:
        cls = peft.PromptTuningConfig if method == "prompt" else peft.PromptEncoderConfig
        config = cls(**shared, token_dim=frozen.geometry.width)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(plain_copy(frozen), config)
    expected = peft_logits(wrapped, 5)
    wrapped.save_pretrained(tmp_path)
    prompt = import_peft(tmp_path, frozen)
    assert prompt.kind == ("prefix" if method.startswith(("prefix", "cartridge")) else "embedding")
    torch.testing.assert_close(our_logits(frozen, prompt), expected, rtol=2e-4, atol=2e-4)


@pytest.fixture
def exported(tiny_frozen: Callable[..., FrozenLM], tmp_path: Path) -> Path:
    prompt = build_prompt(PromptConfig(kind="prefix", length=5), tiny_frozen("llama"), seed=1)
    return export_peft(prompt, tmp_path / "out", model_name="base")


def edit(directory: Path, **changes: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"peft_type": "LORA"}, ArtifactError, "type 'LORA'"),
        ({"task_type": "SEQ_2_SEQ_LM"}, ArtifactError, "encoder-decoder"),
        ({"num_transformer_submodules": 2}, ArtifactError, "encoder-decoder"),
        ({"num_layers": 4}, PromptMismatchError, "layers, KV heads"),
        ({"num_virtual_tokens": 6}, PromptMismatchError, r"expected \[6,"),
        ({"num_virtual_tokens": None}, PromptMismatchError, "expected"),
    ],
)
def test_what_cannot_be_imported_is_refused(changes, error, said: str, exported: Path, tiny_frozen):
    edit(exported, **changes)
    with pytest.raises(error, match=said):
        import_peft(exported, tiny_frozen("llama"))


def test_another_model_is_refused_by_its_shapes(exported: Path, tiny_frozen):
    with pytest.raises(PromptMismatchError, match="tiny-gpt2"):
        import_peft(exported, tiny_frozen("gpt2"))


def test_damage_is_noticed_and_pickles_are_never_loaded(exported: Path, tiny_frozen):
    path = exported / "adapter_model.safetensors"
    whole = path.read_bytes()
    tensors = load_file(path)
    for content in (b"", whole[:40], whole[:-1], pickle.dumps(tensors)):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match="no safetensors file"):
            import_peft(exported, tiny_frozen("llama"))
    save_file(tensors | {"base_model.score.weight": torch.zeros(1)}, path)
    with pytest.raises(ArtifactError, match="more than a prompt"):
        import_peft(exported, tiny_frozen("llama"))
    save_file({"prompt_embeddings": tensors["prompt_embeddings"] * float("nan")}, path)
    with pytest.raises(ArtifactError, match="not finite"):
        import_peft(exported, tiny_frozen("llama"))
    path.rename(exported / "adapter_model.bin")
    with pytest.raises(ArtifactError, match="never loaded"):
        import_peft(exported, tiny_frozen("llama"))
    (exported / "adapter_config.json").write_text("{", encoding="utf-8")
    path.write_bytes(whole)
    with pytest.raises(ArtifactError, match="no valid JSON"):
        import_peft(exported, tiny_frozen("llama"))


def test_an_export_is_replaced_only_when_asked(exported: Path, tiny_frozen):
    prompt = build_prompt(PromptConfig(kind="prefix", length=3), tiny_frozen("llama"), seed=1)
    with pytest.raises(StorageError, match="overwrite"):
        export_peft(prompt, exported, model_name="base")
    export_peft(prompt, exported, model_name="base", overwrite=True)
    assert import_peft(exported, tiny_frozen("llama")).length == 3


def test_layers_that_differ_have_no_form_in_peft(make_prompt, tmp_path: Path, model):
    with pytest.raises(UnsupportedModelError, match="3 layers of 3 shapes"):
        export_peft(make_prompt("prefix"), tmp_path / "out", model_name="base")
    directory = export_peft(make_prompt("embedding"), tmp_path / "out", model_name="base")
    assert torch.equal(import_peft(directory, replace(model)).table_PW, make_prompt("embedding").table_PW)
