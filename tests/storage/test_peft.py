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
from softprompts.errors import ArtifactError, ConfigError, PromptMismatchError, StorageError, UnsupportedModelError
from softprompts.models import FrozenLM
from softprompts.prompted import PromptedLM
from softprompts.prompts import SoftPrompt, build_prompt, prompt_from_table
from softprompts.storage.match import unknown_model
from softprompts.storage.peft import export_peft, import_peft, peft_method
from softprompts.types import Batch

peft = pytest.importorskip("peft")

FAMILIES = ["gpt2", "llama", "qwen3", "gemma3", "mistral", "opt", "gpt_neox", "phi"]
IDS = torch.tensor([[72, 105, 32, 116, 104, 101, 114, 101]])

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated")  # which PEFT reads


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


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_cartridge_of_ours_gives_our_logits_in_peft(family: str, tiny_frozen: Callable[..., FrozenLM], tmp_path):
    frozen = tiny_frozen(family)
    prompt = build_prompt(PromptConfig(kind="prefix", length=5), frozen, seed=1)
    directory = export_peft(prompt, tmp_path / "out", model_name="base", method="cartridge")
    assert peft_method(directory) == "CARTRIDGE"
    wrapped = peft.PeftModel.from_pretrained(plain_copy(frozen), directory)
    torch.testing.assert_close(peft_logits(wrapped, 5), our_logits(frozen, prompt), rtol=2e-4, atol=2e-4)
    assert torch.equal(import_peft(directory, frozen).table_PW, prompt.table_PW)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_one_task_of_a_multitask_prompt_is_composed(family: str, tiny_frozen: Callable[..., FrozenLM], tmp_path: Path):
    frozen = tiny_frozen(family)
    config = peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, num_tasks=3, num_ranks=2, num_layers=3, num_attention_heads=4,
        token_dim=frozen.geometry.width,
    )  # fmt: skip
    wrapped = peft.get_peft_model(plain_copy(frozen), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "prefix_task" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    wrapped.save_pretrained(tmp_path)
    for task in range(3):
        with torch.no_grad():
            logits_TV = wrapped.eval()(
                input_ids=IDS, attention_mask=torch.ones_like(IDS), task_ids=torch.tensor([task])
            ).logits[0]
        ours = our_logits(frozen, import_peft(tmp_path, frozen, task=task))
        torch.testing.assert_close(ours, logits_TV[5:-1], rtol=2e-4, atol=2e-4)
    for missing in (None, 3):
        with pytest.raises(ConfigError, match=r"3 tasks \(0 to 2\)"):
            import_peft(tmp_path, frozen, task=missing)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"prefix_task_rows": torch.zeros(3, 1, 32)}, path)
    with pytest.raises(ArtifactError, match="do not make a prompt"):
        import_peft(tmp_path, frozen, task=0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_context_aware_prompt_is_base_and_delta(family: str, tiny_frozen: Callable[..., FrozenLM], tmp_path: Path):
    frozen = tiny_frozen(family)
    config = peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[1, 2, 3, 4, 5], cpt_mask=[1] * 5, cpt_tokens_type_mask=[1, 2, 2, 3, 4],
        num_layers=3, num_attention_heads=4, token_dim=frozen.geometry.width,
    )  # fmt: skip
    wrapped = peft.get_peft_model(plain_copy(frozen), config)
    with torch.no_grad():
        encoder = wrapped.prompt_encoder["default"]
        encoder.delta_embedding.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    expected = peft_logits(wrapped, 5)
    wrapped.save_pretrained(tmp_path)
    prompt = import_peft(tmp_path, frozen)
    assert not torch.equal(prompt.table_PW, frozen.embed([1, 2, 3, 4, 5]))
    torch.testing.assert_close(our_logits(frozen, prompt), expected, rtol=2e-4, atol=2e-4)


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
        ({"peft_type": "LORA"}, ArtifactError, "type 'LORA', which cannot be imported: it changes the model's weights"),
        ({"peft_type": "ADAPTION_PROMPT"}, ArtifactError, "through a gate inside the attention"),
        ({"peft_type": "TRAINABLE_TOKENS"}, ArtifactError, "rows of the embedding table"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING"}, ArtifactError, "expected prefix_task_cols and prefix_task_rows"),
        ({"task_type": "SEQ_2_SEQ_LM"}, PromptMismatchError, "made for an encoder-decoder and 'tiny-llama'"),
        ({"num_transformer_submodules": 2}, PromptMismatchError, "made for an encoder-decoder"),
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


def test_what_peft_cannot_represent_is_refused(tiny_frozen, tmp_path: Path):
    prefix = build_prompt(PromptConfig(kind="prefix", length=3, layers=(1, 2)), tiny_frozen("llama"), seed=1)
    with pytest.raises(UnsupportedModelError, match="reaches 2 of 3 layers"):
        export_peft(prefix, tmp_path / "out", model_name="base")
    infix = build_prompt(PromptConfig(kind="embedding", length=3, placement="infix"), tiny_frozen("llama"), seed=1)
    with pytest.raises(UnsupportedModelError, match="is an infix"):
        export_peft(infix, tmp_path / "out", model_name="base")
    unknown = prompt_from_table("embedding", unknown_model(32).geometry, torch.zeros(3, 32))
    with pytest.raises(UnsupportedModelError, match="not on record"):
        export_peft(unknown, tmp_path / "out", model_name="base")
    embedding = build_prompt(PromptConfig(kind="embedding", length=3), tiny_frozen("llama"), seed=1)
    with pytest.raises(UnsupportedModelError, match="as 'cartridge'"):
        export_peft(embedding, tmp_path / "out", model_name="base", method="cartridge")
    assert not (tmp_path / "out").exists()


def test_a_task_is_for_multitask_prompts_only(exported: Path, tiny_frozen):
    with pytest.raises(ConfigError, match="no multitask prompt"):
        import_peft(exported, tiny_frozen("llama"), task=0)
