"""Recomputing activations in the backward pass (gradient checkpointing), in every release of transformers 5.

transformers recomputes only in training mode. That mode also switches dropout on, which is set to zero first, and in
some families something that cannot be: experts that are drawn by lot, for example. Such a model is found out by
running it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompts.errors import UnsupportedModelError
from softprompts.models.dropout import switch_dropout_off

__all__ = ["keep_activations", "recompute_activations"]

_TOKENS = 8
_DRAWS_LOTS = ("phimoe",)
"""Families that draw experts at random in training mode, too seldom for a short check to see it each time."""


def recompute_activations(model: PreTrainedModel, vocab_size: int) -> None:
    """Recompute each layer's activations in the backward pass, without reentrance; dropout is off from now on.

    Args:
        model: In eval mode, and left in it.
        vocab_size: Ids of the check are below this.

    Raises:
        UnsupportedModelError: In training mode the model computes something else even without dropout.
    """
    switch_dropout_off(model)
    _check_training_mode(model, vocab_size)
    once = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=once)
    else:  # until transformers 5.22
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=once)


def keep_activations(model: PreTrainedModel) -> None:
    """Keep activations again. Dropout stays off, as ever."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()


@torch.no_grad()
def _check_training_mode(model: PreTrainedModel, vocab_size: int) -> None:
    ids = torch.randint(vocab_size, (1, _TOKENS), generator=torch.Generator().manual_seed(0)).to(model.device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    logits: list[Tensor] = []
    try:
        with torch.random.fork_rng(devices=devices):  # a model that draws lots must not disturb those of a run
            for training in (False, True):
                model.train(training)
                logits.append(model(**inputs).logits.float())
    finally:
        model.train(was_training)
    allowed = 1e-4 if model.dtype == torch.float32 else 2e-2
    same = float((logits[1] - logits[0]).abs().max()) <= allowed * float(logits[0].abs().max().clamp(min=1e-6))
    if not same or model.config.model_type in _DRAWS_LOTS:
        raise UnsupportedModelError(
            f"'{model.config.model_type}' computes something else in training mode, even without dropout (experts that "
            "are drawn by lot, say), and transformers recomputes activations in that mode only; train it without "
            "gradient checkpointing, with a smaller batch"
        )
