"""PEFT's prompts for encoder-decoders: embeddings go both ways, the rest is refused with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from conftest import byte_tokenizer
from softprompts.config import PromptConfig
from softprompts.errors import ArtifactError, PromptMismatchError, UnsupportedModelError
from softprompts.models import FrozenLM
from softprompts.prompted import PromptedLM
from softprompts.prompts import SoftPrompt, build_prompt
from softprompts.storage.peft import export_peft, import_peft
from softprompts.types import Batch
from zoo_seq2seq import tiny_seq2seq

peft = pytest.importorskip("peft")

SHAPES = ["t5", "t5_wide_heads", "mt5", "bart"]
IDS = torch.tensor([[72, 105, 32, 116, 104, 101, 114, 101]])
TARGETS = torch.tensor([[97, 98, 99, 256]])

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated")  # which PEFT reads


@pytest.fixture(scope="module")
def frozen_of() -> Callable[[str], FrozenLM]:
    made: dict[str, FrozenLM] = {}

    def make(shape: str) -> FrozenLM:
        if shape not in made:
            made[shape] = FrozenLM.from_model(tiny_seq2seq(shape), byte_tokenizer(), name=f"tiny-{shape}")
        return made[shape]

    return make


def our_logits(frozen: FrozenLM, prompt: SoftPrompt) -> Tensor:
    batch = Batch(IDS, torch.ones_like(IDS), None, torch.zeros(1, dtype=torch.long), TARGETS)
    with torch.no_grad():
        return PromptedLM(frozen, [prompt]).label_logits(batch).logits_MV


def peft_logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=TARGETS).logits[0]
    return logits


def made_by_peft(frozen: FrozenLM, cls: type, directory: Path, **options: object) -> torch.nn.Module:
    """A fresh prompt of PEFT on the same weights, saved."""
    model = copy.deepcopy(frozen.model)
    model.set_attn_implementation("eager")
    sizes = {"num_layers": 2, "num_attention_heads": 4, "token_dim": frozen.geometry.width}
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, cls(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5, **(sizes | options)))
    wrapped.save_pretrained(directory)
    return wrapped


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_what_peft_saved_gives_its_logits_here(shape: str, method: str, frozen_of, tmp_path: Path):
    frozen = frozen_of(shape)
    wrapped = made_by_peft(frozen, getattr(peft, method), tmp_path)
    rows = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    prompt = import_peft(tmp_path, frozen)
    assert len(rows) == 10
    assert torch.equal(prompt.table_PW, rows[:5])  # the second half is never read
    torch.testing.assert_close(our_logits(frozen, prompt), peft_logits(wrapped), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_we_export_gives_our_logits_in_peft(shape: str, frozen_of, tmp_path: Path):
    frozen = frozen_of(shape)
    prompt = build_prompt(PromptConfig(kind="embedding", length=5), frozen, seed=1)
    directory = export_peft(prompt, tmp_path / "out", model_name="base")
    model = copy.deepcopy(frozen.model)
    model.set_attn_implementation("eager")
    wrapped = peft.PeftModel.from_pretrained(model, directory)
    ours = our_logits(frozen, prompt)
    torch.testing.assert_close(peft_logits(wrapped), ours, rtol=2e-4, atol=2e-4)
    with_other = our_logits(frozen, build_prompt(PromptConfig(kind="embedding", length=5), frozen, seed=2))
    assert (with_other - ours).abs().max() > 1e-2  # the prompt matters
    assert torch.equal(import_peft(directory, frozen).table_PW, prompt.table_PW)


def test_prefixes_and_multitask_prompts_are_refused(frozen_of, tiny_frozen, tmp_path: Path):
    frozen = frozen_of("t5")
    made_by_peft(frozen, peft.PrefixTuningConfig, tmp_path / "prefix")
    with pytest.raises(ArtifactError, match="moves the decoder's positions"):
        import_peft(tmp_path / "prefix", frozen)
    made_by_peft(frozen, peft.MultitaskPromptTuningConfig, tmp_path / "tasks", num_tasks=2, num_ranks=1)
    with pytest.raises(ArtifactError, match="generates without it"):
        import_peft(tmp_path / "tasks", frozen, task=0)
    made_by_peft(frozen, peft.PromptTuningConfig, tmp_path / "prompt")
    with pytest.raises(PromptMismatchError, match="'tiny-llama' is a decoder-only model"):
        import_peft(tmp_path / "prompt", tiny_frozen("llama"))
    for sites in ((), ("decoder",)):
        prefix = build_prompt(PromptConfig(kind="prefix", length=3, sites=sites), frozen, seed=0)
        with pytest.raises(UnsupportedModelError, match="decoder's self-attention alone"):
            export_peft(prefix, tmp_path / "out", model_name="base")


def without_distances() -> PreTrainedModel:
    model = tiny_seq2seq("t5")
    with torch.no_grad():
        model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.zero_()
    return model


@pytest.mark.parametrize("distances", [True, False])
def test_why_prefixes_are_refused(distances: bool, frozen_of, tmp_path: Path):
    """Its keys and values, laid out as PEFT reads them, give its logits only where distances count for nothing."""
    frozen = frozen_of("t5") if distances else FrozenLM.from_model(without_distances(), byte_tokenizer())
    wrapped = made_by_peft(frozen, peft.PrefixTuningConfig, tmp_path)
    blocks_P4W = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].view(5, 4, 32)
    order = [block % 4 for layer in range(2) for block in (4 * layer, 4 * layer + 1)]
    prompt = build_prompt(PromptConfig(kind="prefix", length=5, sites=("decoder",)), frozen, seed=0)
    with torch.no_grad():
        prompt.parametrization.table_PW.copy_(blocks_P4W[:, order].flatten(1))
    difference = float((our_logits(frozen, prompt) - peft_logits(wrapped)).abs().max())
    assert (difference > 1e-3) == distances
    assert distances or difference < 1e-5
