"""What a prompt comes down to when it is served: keys and values in the number type of the model."""

from __future__ import annotations

from dataclasses import replace

import torch

from softprompts.errors import UnsupportedModelError
from softprompts.models import FrozenLM
from softprompts.prompted import PromptedLM
from softprompts.prompts import SoftPrompt
from softprompts.types import PromptStates

__all__ = ["fold_for_serving", "size_bytes"]


@torch.no_grad()
def fold_for_serving(frozen: FrozenLM, prompt: SoftPrompt, name: str) -> PromptStates:
    """Compute a prompt once, for all rows that will carry it.

    Args:
        frozen: The model.
        prompt: Made for it.
        name: For messages.

    Raises:
        PromptMismatchError: It was made for another model.
        UnsupportedModelError: It is an infix.
    """
    if prompt.is_infix:
        raise UnsupportedModelError(
            f"prompt '{name}' is an infix, and a served text does not say where its input ends; train it with "
            "prompt.placement: prefix"
        )
    (states,) = PromptedLM(frozen, [prompt]).states()
    dtype = frozen.dtype
    pairs = {layer: (k.detach().to(dtype), v.detach().to(dtype)) for layer, (k, v) in states.keys_values.items()}
    return replace(states, keys_values=pairs)


def size_bytes(states: PromptStates) -> int:
    """Memory that a prompt takes."""
    tensors = [tensor for pair in states.keys_values.values() for tensor in pair]
    tensors += [] if states.embeddings_PD is None else [states.embeddings_PD]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
