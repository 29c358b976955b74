"""Prefix-tuning (Li & Liang 2021): learned keys and values in front of every layer's attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from softprompts.prompts.base import SoftPrompt
from softprompts.types import Geometry, LayerKey, PromptStates

__all__ = ["PrefixPrompt", "flatten_states", "unflatten_states"]


@final
class PrefixPrompt(SoftPrompt):
    """P learned positions of keys and values in every layer (Li & Liang 2021, section 4.1)."""

    kind = "prefix"

    @staticmethod
    def row_width(geometry: Geometry) -> int:
        """Keys and values of all heads of all layers."""
        return geometry.prefix_width

    def forward(self) -> PromptStates:
        """Return keys and values per layer, ``[N, P, H]``."""
        return PromptStates(length=self.length, keys_values=unflatten_states(self.geometry, self.table()))


def unflatten_states(geometry: Geometry, table_PW: Tensor) -> dict[LayerKey, tuple[Tensor, Tensor]]:
    """Cut a table into keys and values ``[N, P, H]`` per layer.

    A row holds, in the order of ``geometry.sites``, the keys of all heads and then the values of all heads.
    """
    states: dict[LayerKey, tuple[Tensor, Tensor]] = {}
    start = 0
    for site in geometry.sites:
        middle = start + site.kv_heads * site.key_size
        end = middle + site.kv_heads * site.value_size
        keys = table_PW[:, start:middle].unflatten(1, (site.kv_heads, site.key_size)).transpose(0, 1)
        values = table_PW[:, middle:end].unflatten(1, (site.kv_heads, site.value_size)).transpose(0, 1)
        states[site.key] = (keys, values)
        start = end
    return states


def flatten_states(geometry: Geometry, keys_values: Mapping[LayerKey, tuple[Tensor, Tensor]]) -> Tensor:
    """Lay keys and values out as one float32 table ``[P, W]`` (the inverse of :func:`unflatten_states`)."""
    columns = [states.float().transpose(0, 1).flatten(1) for site in geometry.sites for states in keys_values[site.key]]
    return torch.cat(columns, dim=1)
