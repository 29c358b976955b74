"""What causal models and encoder-decoders with a prompt have in common: ``generate``, and doing without the prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from softprompts.errors import ConfigError
from softprompts.integrations.huggingface.model import PromptModel
from softprompts.models.attention import Steering
from softprompts.models.snapshot import ModelSnapshot
from softprompts.prompted import PromptedLM
from softprompts.types import LayerKey, PromptStates

__all__ = ["GeneratingPromptModel", "refuse_inner_outputs", "with_rows"]


class GeneratingPromptModel(PromptModel, GenerationMixin):
    """A prompt on a frozen model that writes text."""

    def __init__(self, prompted: PromptedLM, before: ModelSnapshot) -> None:
        super().__init__(prompted, before)
        self._is_stateful = prompted.frozen.model._is_stateful
        self._disabled = False

    @property
    def _steers(self) -> bool:
        return self._attached and not self._disabled

    def states(self) -> PromptStates:
        """Compute the prompt's embeddings, or its keys and values, with gradient."""
        return self.prompted.states()[0]

    def steering(self, states: PromptStates) -> Steering:
        """What steers one forward pass in which all rows carry the prompt."""
        return Steering(self.frozen.layer_of, with_rows(states))

    @contextlib.contextmanager
    def disable(self) -> Iterator[None]:
        """Leave the prompt out: inside, this is the base model.

        Bit for bit so where the base was loaded with ``sdpa`` attention, the default; otherwise up to rounding.
        """
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does, behind the prompt, which is computed once."""
        if self._steers:
            kwargs["prompt_states"] = self.states()
        return GenerationMixin.generate(self, *args, **kwargs)  # type: ignore[arg-type]

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the frozen model does it; what it does not know of is handed through."""
        base: Any = self.frozen.model
        inputs: dict[str, Any] = base.prepare_inputs_for_generation(*args, **kwargs)
        return inputs

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        base: Any = self.frozen.model
        updated: dict[str, Any] = base._update_model_kwargs_for_generation(*args, **kwargs)
        return updated

    def _supports_default_dynamic_cache(self) -> bool:  # type: ignore[override]
        base: Any = self.frozen.model
        return bool(base._supports_default_dynamic_cache())


def with_rows(states: PromptStates) -> Mapping[LayerKey, tuple[Tensor, Tensor]]:
    """Keys and values ``[1, N, P, H]`` for all rows of a batch.

    Nothing here depends on values, so that torch.compile sees one graph.
    """
    return {layer: (keys[None], values[None]) for layer, (keys, values) in states.keys_values.items()}


def refuse_inner_outputs(kwargs: dict[str, Any]) -> None:
    """Take what asks for inner outputs away, and refuse to give any.

    Raises:
        ConfigError: Attention weights or hidden states of all layers are asked for.
    """
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.pop(name, None):
            raise ConfigError(f"{name} is not offered with a prompt attached; leave it out, or use `disable()`")
    kwargs.pop("return_dict", None)
