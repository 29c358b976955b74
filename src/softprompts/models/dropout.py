"""Dropout and other noise in a frozen model: there is none, in whatever mode it runs."""

from __future__ import annotations

from torch import nn

__all__ = ["switch_dropout_off"]

_NOISE_FIELDS = ("dropout", "attention_dropout", "activation_dropout", "layerdrop", "hidden_dropout", "jitter_noise")
"""What modules call their shares of dropout, and the noise of routers to experts (Switch, Mixtral)."""


def switch_dropout_off(model: nn.Module) -> None:
    """Set dropout and noise to zero, for runs in training mode (transformers recomputes in that mode only)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _NOISE_FIELDS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
