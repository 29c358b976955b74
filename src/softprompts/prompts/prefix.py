"""Prefix-tuning (Li & Liang 2021): learned keys and values in front of every layer's attention."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import final

import torch
from torch import Tensor

from softprompts.errors import ConfigError
from softprompts.prompts.base import SoftPrompt
from softprompts.types import Geometry, LayerKey, PromptStates

__all__ = ["PrefixPrompt", "choose_layers", "flatten_states", "site_widths", "unflatten_states"]


@final
class PrefixPrompt(SoftPrompt):
    """P learned positions of keys and values in every layer, or in some (Li & Liang 2021, section 4.1).

    On an encoder-decoder: of their own in the encoder's self-attention, the decoder's and the cross-attention.
    """

    kind = "prefix"

    @staticmethod
    def row_width(geometry: Geometry, layers: Collection[LayerKey] | None = None) -> int:
        """Keys and values of all heads of these layers."""
        return sum(site.width for site in geometry.reached(layers))

    def forward(self) -> PromptStates:
        """Return keys and values per layer, ``[N, P, H]``."""
        keys_values = unflatten_states(self.geometry, self.table(), self.layers)
        return PromptStates(length=self.length, keys_values=keys_values, infix=self.is_infix)


def unflatten_states(
    geometry: Geometry, table_PW: Tensor, layers: Collection[LayerKey] | None = None
) -> dict[LayerKey, tuple[Tensor, Tensor]]:
    """Cut a table into keys and values ``[N, P, H]`` per layer.

    A row holds, in the order of ``geometry.sites``, the keys of all heads and then the values of all heads, of these
    layers (``None``: of all).
    """
    states: dict[LayerKey, tuple[Tensor, Tensor]] = {}
    start = 0
    for site in geometry.reached(layers):
        middle = start + site.kv_heads * site.key_size
        end = middle + site.kv_heads * site.value_size
        keys = table_PW[:, start:middle].unflatten(1, (site.kv_heads, site.key_size)).transpose(0, 1)
        values = table_PW[:, middle:end].unflatten(1, (site.kv_heads, site.value_size)).transpose(0, 1)
        states[site.key] = (keys, values)
        start = end
    return states


def flatten_states(
    geometry: Geometry,
    keys_values: Mapping[LayerKey, tuple[Tensor, Tensor]],
    layers: Collection[LayerKey] | None = None,
) -> Tensor:
    """Lay keys and values out as one float32 table ``[P, W]`` (the inverse of :func:`unflatten_states`)."""
    pairs = [keys_values[site.key] for site in geometry.reached(layers)]
    return torch.cat([states.float().transpose(0, 1).flatten(1) for pair in pairs for states in pair], dim=1)


def choose_layers(
    geometry: Geometry, sites: Collection[str] = (), layers: Collection[int] = ()
) -> tuple[LayerKey, ...] | None:
    """Say which layers a prefix reaches.

    Args:
        geometry: The model.
        sites: Of ``encoder``, ``decoder`` and ``cross``; empty means all that the model has.
        layers: Numbers of layers at each site, from 0; empty means all.

    Returns:
        Their keys, in the order of the model; ``None`` for all of them.

    Raises:
        ConfigError: The model has no such site or no such layer.
    """
    offered = {site.key.site: None for site in geometry.sites}  # in order, each once
    for site in sites:
        if site not in offered:
            raise ConfigError(
                f"prompt.sites names '{site}', but this {geometry.family} has: {', '.join(offered)}; a decoder-only "
                "model has one site, leave prompt.sites empty for it"
            )
    deepest = max((site.key.layer for site in geometry.sites if not sites or site.key.site in sites), default=-1)
    for layer in layers:
        if not 0 <= layer <= deepest:
            raise ConfigError(f"prompt.layers names layer {layer}, but they are numbered from 0 to {deepest}")
    keys = tuple(
        site.key
        for site in geometry.sites
        if (not sites or site.key.site in sites) and (not layers or site.key.layer in layers)
    )
    return None if len(keys) == len(geometry.sites) else keys


def site_widths(geometry: Geometry, layers: Collection[LayerKey] | None = None) -> list[int]:
    """Columns of the table that belong to each site, in order: what has a reparametrization of its own."""
    widths: dict[str, int] = {}
    for site in geometry.reached(layers):
        widths[site.key.site] = widths.get(site.key.site, 0) + site.width
    return list(widths.values())
