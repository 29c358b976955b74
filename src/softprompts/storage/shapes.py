"""What a prompt's tensors look like, and how ``prompt.json`` writes down the shapes of its model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from softprompts.errors import ArtifactError
from softprompts.types import Geometry, KeyValueSite, LayerKey

__all__ = [
    "GeometryJson",
    "SiteJson",
    "geometry_from_json",
    "geometry_to_json",
    "layers_from_json",
    "partial_geometry",
    "tensor_shapes",
]


@dataclass(frozen=True)
class SiteJson:
    """One layer as ``prompt.json`` has it."""

    site: str
    layer: int
    kv_heads: int
    key_size: int
    value_size: int
    window: int | None


@dataclass(frozen=True)
class GeometryJson:
    """The model's shapes as ``prompt.json`` has them; ``null`` is what is not known."""

    family: str | None
    width: int
    vocab_size: int | None
    max_positions: int | None
    sites: tuple[SiteJson, ...] | None
    prompt_scrolls: bool = False
    """Only written where it is true."""


def partial_geometry(width: int) -> Geometry:
    """What is known of the model of embeddings that come without one."""
    return Geometry(family="unknown", width=width, vocab_size=0, max_positions=None, sites=())


def tensor_shapes(
    kind: str, length: int, geometry: Geometry, layers: Collection[LayerKey] | None = None
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a prompt, in the order in which they make up one position of its flat table.

    ``{"embeddings": (P, D)}`` or, per layer, ``{"self.0.keys": (N, P, H), "self.0.values": (N, P, H)}`` (of the
    layers that the prefix reaches; ``None`` for all).
    """
    if kind == "embedding":
        return {"embeddings": (length, geometry.width)}
    shapes: dict[str, tuple[int, ...]] = {}
    for site in geometry.reached(layers):
        name = f"{site.key.site}.{site.key.layer}"
        shapes[f"{name}.keys"] = (site.kv_heads, length, site.key_size)
        shapes[f"{name}.values"] = (site.kv_heads, length, site.value_size)
    return shapes


def layers_from_json(names: Sequence[str] | None, geometry: Geometry) -> tuple[LayerKey, ...] | None:
    """Read the names (``"decoder.0"``) of the layers that a prefix reaches; ``None`` is all of them.

    Raises:
        ArtifactError: The model has no such layer, none is named, or all are (then nothing is to be named).
    """
    if names is None:
        return None
    offered = {f"{site.key.site}.{site.key.layer}": site.key for site in geometry.sites}
    unknown = [name for name in names if name not in offered]
    if unknown or len(set(names)) != len(names) or not 0 < len(names) < len(offered):
        example = f", '{unknown[0]}' among them" if unknown else ""
        raise ArtifactError(
            f"prompt.json names {len(names)} layers that the prefix reaches{example}; expected some, but not all, of "
            f"the {len(offered)} layers of its geometry, each once"
        )
    return tuple(key for name, key in offered.items() if name in names)


def geometry_to_json(geometry: Geometry) -> dict[str, Any]:
    """Write the shapes down as plain data."""
    sites = [
        {
            "site": site.key.site,
            "layer": site.key.layer,
            "kv_heads": site.kv_heads,
            "key_size": site.key_size,
            "value_size": site.value_size,
            "window": site.window,
        }
        for site in geometry.sites
    ]
    known = not geometry.is_partial
    scrolls = {"prompt_scrolls": True} if geometry.prompt_scrolls else {}
    return {
        "family": geometry.family if known else None,
        "width": geometry.width,
        "vocab_size": geometry.vocab_size if known else None,
        "max_positions": geometry.max_positions,
        "sites": sites if known else None,
        **scrolls,
    }


def geometry_from_json(raw: GeometryJson) -> Geometry:
    """Read the shapes.

    Raises:
        ArtifactError: Some of what is only known together is missing.
    """
    if raw.family is not None and raw.vocab_size is not None and raw.sites is not None:
        sites = tuple(
            KeyValueSite(LayerKey(site.site, site.layer), site.kv_heads, site.key_size, site.value_size, site.window)
            for site in raw.sites
        )
        return Geometry(
            raw.family, raw.width, raw.vocab_size or -1, raw.max_positions, sites, prompt_scrolls=raw.prompt_scrolls
        )
    if (raw.family, raw.vocab_size, raw.max_positions, raw.sites) != (None, None, None, None):
        raise ArtifactError(
            "prompt.json knows a part of the model's geometry; either all of it is known, or nothing but the width"
        )
    return partial_geometry(raw.width)
