"""The language model of a recipe, its loss, and its Hugging Face directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, T5ForConditionalGeneration

from softprompts.pretraining.attention import register_blocked_attention
from softprompts.pretraining.encoder_decoder import build_encoder_decoder, pair_loss
from softprompts.pretraining.pairs import Pairing
from softprompts.pretraining.recipe import LMConfig, LMTrainingConfig
from softprompts.pretraining.tokens import save_tokenizer

__all__ = ["LanguageModel", "build_model", "export", "loss_function", "pick_device", "replace_folder"]

LanguageModel = LlamaForCausalLM | T5ForConditionalGeneration
_TIED = ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def pick_device(name: str) -> torch.device:
    """Turn ``auto`` into the accelerator, if there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build_model(config: LMConfig, vocab_size: int, training: LMTrainingConfig) -> LanguageModel:
    """Make the model with random weights that depend on the seed alone."""
    device = pick_device(training.device)
    if config.kind == "encoder_decoder":
        pair = build_encoder_decoder(config, vocab_size, training.seed)
        pair.to(device)  # type: ignore[arg-type]
        return pair
    return _build_decoder(config, vocab_size, training, device)


def _build_decoder(
    config: LMConfig, vocab_size: int, training: LMTrainingConfig, device: torch.device
) -> LlamaForCausalLM:
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


def loss_function(
    model: LanguageModel, training: LMTrainingConfig, pairing: Pairing | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return ``rows -> mean cross-entropy`` in nats per token, compiled if the recipe says so.

    Args:
        model: Decoder or encoder-decoder.
        training: Says precision and compilation.
        pairing: What rows of an encoder-decoder consist of, ``[B, S + U]``; those of a decoder are ids ``[B, T + 1]``.
    """
    use_bf16 = training.precision == "bf16"
    device = pick_device(training.device).type
    if isinstance(model, LlamaForCausalLM):
        inner = _next_token_loss(model)
    else:
        assert pairing is not None, "an encoder-decoder learns pairs"
        inner = pair_loss(model, pairing)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=use_bf16):
            return inner(rows)

    return torch.compile(loss, dynamic=False) if training.compile else loss


def _next_token_loss(model: LlamaForCausalLM) -> Callable[[torch.Tensor], torch.Tensor]:
    def loss(ids: torch.Tensor) -> torch.Tensor:
        hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
        logits = model.lm_head(hidden)
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    return loss


def export(
    model: LanguageModel, tokenizer: Tokenizer, context: int, folder: Path, dtype: torch.dtype = torch.float32
) -> None:
    """Write model and tokenizer where ``from_pretrained(folder)`` finds them; ``folder`` is replaced as a whole.

    Args:
        model: What was trained.
        tokenizer: Its tokenizer, sentinels included.
        context: Longest text, as the tokenizer's files say it.
        folder: Where they go.
        dtype: Of the weights on disk.

    Raises:
        OSError: The folder cannot be written.
    """
    scratch = folder.with_name(folder.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    settings = {k: v for k, v in model.config.to_dict().items() if not k.startswith(("_", "attn_impl"))}
    clean = type(model.config)(**settings)
    clean.use_cache = True
    clean.dtype = dtype
    clean.architectures = [type(model).__name__]
    weights = {name: p.detach().to("cpu", dtype).contiguous() for name, p in model.state_dict().items()}
    for name in _TIED:  # each is one of the embeddings, stored once
        weights.pop(name, None)
    save_file(weights, str(scratch / "model.safetensors"), metadata={"format": "pt"})
    (scratch / "model.safetensors").chmod(0o644)  # safetensors leaves it to its owner alone
    clean.save_pretrained(str(scratch))
    save_tokenizer(tokenizer, scratch, context)
    replace_folder(scratch, folder)


def replace_folder(scratch: Path, folder: Path) -> None:
    """Swap ``scratch`` in for ``folder``; readers see one or the other but for an instant."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    scratch.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
