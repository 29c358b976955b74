"""The T5-type encoder-decoder of a recipe and its loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import T5Config, T5ForConditionalGeneration

from softprompts.pretraining.pairs import Pairing
from softprompts.pretraining.recipe import LMConfig

__all__ = ["build_encoder_decoder", "pair_loss"]

_PAD = 1


def build_encoder_decoder(config: LMConfig, vocab_size: int, seed: int) -> T5ForConditionalGeneration:
    """Make a T5 v1.1 (gated GELU, relative positions, RMS norms, no biases, no dropout) with tied embeddings.

    Tied, because the vocabulary is a quarter of a model this small and would be half of it, and because transformers 5
    ties T5's head anyway; the factor ``width ** -0.5`` of T5 1.0 in front of it lets logits begin at about 1.

    Args:
        config: Its shape.
        vocab_size: Sentinels included.
        seed: Weights depend on it alone.
    """
    decoder_layers = config.decoder_layers or config.layers
    t5 = T5Config(  # type: ignore[call-arg]
        vocab_size=vocab_size,
        d_model=config.width,
        d_kv=config.width // config.heads,
        d_ff=config.mlp_width,
        num_layers=config.layers,
        num_decoder_layers=decoder_layers,
        num_heads=config.heads,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=True,
        pad_token_id=_PAD,
        eos_token_id=0,
        decoder_start_token_id=_PAD,
        # Relative biases need gradients, which PyTorch's fused kernels have not; the compiler fuses the plain products.
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(t5)
    with torch.no_grad():
        # What a block adds to the stream starts small in proportion to depth (GPT-2); a decoder layer adds three times.
        for stack, additions in ((model.encoder, 2 * config.layers), (model.decoder, 3 * decoder_layers)):
            for name, parameter in stack.named_parameters():
                if name.endswith((".o.weight", ".wo.weight")):
                    parameter.mul_(additions**-0.5)
    return model


def pair_loss(model: T5ForConditionalGeneration, pairing: Pairing) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return ``rows [B, S + U] -> mean cross-entropy`` of the targets, in nats per token."""
    scale = model.config.d_model**-0.5
    border, pads = pairing.input_length, pairing.pads

    def loss(rows: torch.Tensor) -> torch.Tensor:
        inputs_BS, targets_BU = rows[:, :border], rows[:, border:]
        mask_BS = (inputs_BS != _PAD).long() if pads else None
        read_BU = F.pad(targets_BU[:, :-1], (1, 0), value=_PAD)
        encoded = model.encoder(input_ids=inputs_BS, attention_mask=mask_BS).last_hidden_state
        hidden = model.decoder(
            input_ids=read_BU, encoder_hidden_states=encoded, encoder_attention_mask=mask_BS, use_cache=False
        ).last_hidden_state
        logits = model.lm_head(hidden * scale)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets_BU.flatten())

    return loss
