"""The frozen weights as transformers runs them, without anything of ours."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedModel

from softprompts.models import FrozenLM

__all__ = ["separate_model"]


def separate_model(frozen: FrozenLM) -> PreTrainedModel:
    """Give a second model on the same weights, with the attention that transformers chooses by itself."""
    weights: dict[int, Any] = {id(parameter): parameter for parameter in frozen.model.parameters()}
    model: PreTrainedModel = copy.deepcopy(frozen.model, weights)
    model.set_attn_implementation("sdpa")
    model.eval()
    if getattr(model, "loss_type", None) is None:
        model.loss_type = "ForCausalLM"  # what transformers takes anyway, and says so
    return model
