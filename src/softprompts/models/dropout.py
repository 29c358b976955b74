"""Dropout and other noise in a frozen model: there is none, in whatever mode it runs."""

from __future__ import annotations

from torch import nn

__all__ = ["noise_of", "switch_dropout_off"]


def noise_of(module: nn.Module) -> list[str]:
    """Attributes of a module that hold a share of dropout, or the noise of a router to experts (Switch, Mixtral).

    Families call them ``dropout``, ``attn_dropout``, ``layerdrop``, ``hidden_dropout_prob``, ...
    """
    held = vars(module).items()
    names = [name for name, value in held if isinstance(value, float) and ("drop" in name or name == "jitter_noise")]
    return [*names, "p"] if isinstance(module, nn.Dropout) else names


def switch_dropout_off(model: nn.Module) -> None:
    """Set dropout and noise to zero, for runs in training mode (transformers recomputes in that mode only)."""
    for module in model.modules():
        for name in noise_of(module):
            setattr(module, name, 0.0)
