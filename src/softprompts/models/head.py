"""The head of a model: logits from hidden states, with everything that the model itself does on the way.

Families scale, cap, project or bias their logits in the forward of the causal LM, behind the output embeddings. None
of that is written down again here: the model's own forward is run, with hidden states that are given instead of
computed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from softprompts.errors import UnsupportedModelError

__all__ = ["OwnHead", "body_of"]


def body_of(model: PreTrainedModel) -> nn.Module:
    """The part of a causal LM that turns tokens into hidden states.

    Raises:
        UnsupportedModelError: The model does not say which part that is.
    """
    body = model.base_model
    if body is not model:
        return body
    parts = [module for module in model.children() if isinstance(module, PreTrainedModel)]
    if len(parts) != 1:
        raise UnsupportedModelError(
            f"'{model.config.model_type}' does not say which of its modules makes the hidden states; it is refused"
        )
    return parts[0]


class _GivenOutput(BaseModelOutput):
    """Hidden states, and nothing of what else a family may ask its body for."""

    def __getattr__(self, name: str) -> None:
        """Return ``None`` for whatever this family's output has and a plain one has not."""
        if name.startswith("_"):
            raise AttributeError(name)


class _Given(nn.Module):
    """Stands where the body stands and hands back the hidden states that it is called with."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _GivenOutput:
        """Return ``inputs_embeds`` as the last hidden state."""
        return _GivenOutput(last_hidden_state=inputs_embeds)

    @property
    def decoder(self) -> _Given:
        """Some families call the inner part of their body."""
        return self


class OwnHead:
    """Logits as the model's own forward makes them.

    Args:
        model: The causal LM; nothing of it is changed.
        body: What :func:`body_of` found.
    """

    def __init__(self, model: PreTrainedModel, body: nn.Module) -> None:
        self.output_embeddings = model.get_output_embeddings()
        # A second shell around the same modules and weights, whose body gives back what it is given.
        self._shell = copy.copy(model)
        self._shell.__dict__.pop("forward", None)  # of a model spread over devices: bound to the first shell
        self._shell._modules = {name: _Given() if module is body else module for name, module in model._modules.items()}
        self.is_plain = False
        self.is_plain = self._just_multiplies()

    def __call__(self, hidden_MD: Tensor) -> Tensor:
        """Logits ``[M, V]`` in float32 from hidden states at any positions."""
        if self.is_plain:
            plain: Tensor = self.output_embeddings(hidden_MD)
            return plain.float()
        logits: Tensor = self._shell(inputs_embeds=hidden_MD[None], use_cache=False).logits
        return logits[0].float()

    @torch.no_grad()
    def _just_multiplies(self) -> bool:
        """Whether the model's forward adds nothing to its output embeddings; then they are called directly."""
        weight = getattr(self.output_embeddings, "weight", None)
        if not isinstance(weight, Tensor):
            return False
        generator = torch.Generator().manual_seed(2)
        hidden_MD = torch.randn(4, weight.shape[-1], generator=generator).to(weight.device, weight.dtype) * 30
        try:
            own = self(hidden_MD)
        except RuntimeError:  # hidden states of another width: the head projects them first
            return False
        return torch.equal(own, self.output_embeddings(hidden_MD).float())
