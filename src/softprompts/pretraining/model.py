"""The language model of a recipe, its loss, and its Hugging Face directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from softprompts.pretraining.attention import register_blocked_attention
from softprompts.pretraining.recipe import LMConfig, LMTrainingConfig
from softprompts.pretraining.tokens import TokenFiles, save_tokenizer

__all__ = ["build_model", "export", "loss_function", "pick_device"]


def pick_device(name: str) -> torch.device:
    """Turn ``auto`` into the accelerator, if there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build_model(config: LMConfig, vocab_size: int, training: LMTrainingConfig) -> LlamaForCausalLM:
    """Make the decoder with random weights that depend on the seed alone."""
    device = pick_device(training.device)
    llama = LlamaConfig(  # type: ignore[call-arg]
        vocab_size=vocab_size,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads or config.heads,
        max_position_embeddings=config.context,
        initializer_range=config.init_std,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        use_cache=False,
        attn_implementation=register_blocked_attention() if device.type == "cpu" else "sdpa",
    )
    torch.manual_seed(training.seed)
    model = LlamaForCausalLM(llama)
    model.to(device)  # type: ignore[arg-type]
    with torch.no_grad():
        # What a block adds to the stream starts small in proportion to depth (GPT-2).
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_((2 * config.layers) ** -0.5)
    return model


def loss_function(model: LlamaForCausalLM, training: LMTrainingConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return ``ids [B, T+1] -> mean cross-entropy`` in nats per token, compiled if the recipe says so."""
    use_bf16 = training.precision == "bf16"
    device = pick_device(training.device).type

    def loss(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=use_bf16):
            hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
            logits = model.lm_head(hidden)
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    return torch.compile(loss, dynamic=False) if training.compile else loss


def export(model: LlamaForCausalLM, files: TokenFiles, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write model and tokenizer where ``from_pretrained(folder)`` finds them; ``folder`` is replaced as a whole.

    Raises:
        OSError: The folder cannot be written.
    """
    scratch = folder.with_name(folder.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    clean = LlamaConfig(**{k: v for k, v in model.config.to_dict().items() if not k.startswith(("_", "attn_impl"))})
    clean.use_cache = True
    clean.dtype = dtype
    clean.architectures = ["LlamaForCausalLM"]
    weights = {name: p.detach().to("cpu", dtype).contiguous() for name, p in model.state_dict().items()}
    weights.pop("lm_head.weight", None)  # tied to the embeddings
    save_file(weights, str(scratch / "model.safetensors"), metadata={"format": "pt"})
    (scratch / "model.safetensors").chmod(0o644)  # safetensors leaves it to its owner alone
    clean.save_pretrained(str(scratch))
    save_tokenizer(files.tokenizer, scratch, model.config.max_position_embeddings)
    _replace_folder(scratch, folder)


def _replace_folder(scratch: Path, folder: Path) -> None:
    """Swap ``scratch`` in for ``folder``; readers see one or the other but for an instant."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    scratch.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
