"""Prompts of one model turned into prompts of another by a learned map.

Su et al. (NAACL 2022, "On Transferability of Prompt Tuning", cross-model transfer): flatten the prompt, Linear to 768,
LeakyReLU, Linear, LayerNorm of every position; or the same map for every position by itself. It is trained on some
tasks, either towards the target model's own prompts (distance) or through the frozen target model (task loss), and then
applied to prompts of other tasks.

A prefix is mapped piece by piece: keys and values of every layer apart. A layer of the target takes its piece from the
layer of the source that lies as deep; models of other depth, other numbers of heads and other sizes are bridged alike.
(Keys are mapped as the attention sees them, behind the rotary embedding; ``flatten`` has a weight per position, so it
can learn what a rotation does, ``token`` and ``linear`` treat all positions alike.)

Shape letters: P prompt length, W numbers per position, w numbers of one piece per position.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from softprompts.config import ProjectorConfig
from softprompts.errors import LengthError, PromptMismatchError
from softprompts.prompts import SoftPrompt
from softprompts.prompts.init import KINDS
from softprompts.types import Geometry, LayerKey

__all__ = ["Projector", "PromptSpace", "depth_map", "projected_prompt", "projection_distance"]


@dataclass(frozen=True)
class PromptSpace:
    """All prompts of one kind and length on one model."""

    kind: str
    length: int
    geometry: Geometry
    layers: tuple[LayerKey, ...] | None = None
    """Those that a prefix reaches; ``None`` for all."""

    @classmethod
    def of(cls, prompt: SoftPrompt) -> PromptSpace:
        """The space that a prompt lies in."""
        return cls(prompt.kind, prompt.length, prompt.geometry, prompt.layers)

    def on(self, geometry: Geometry) -> PromptSpace:
        """The space of the same prompts on another model: a prefix reaches all layers of the same attentions.

        Raises:
            PromptMismatchError: The other model lacks an attention that this prefix reaches.
        """
        if self.kind == "embedding":
            return PromptSpace(self.kind, self.length, geometry)
        names = {site.key.site for site in self.geometry.reached(self.layers)}
        lacking = sorted(names - {site.key.site for site in geometry.sites})
        if lacking:
            offered = ", ".join(sorted({site.key.site for site in geometry.sites})) or "none"
            raise PromptMismatchError(
                f"the prefix has keys and values for '{lacking[0]}' attention, the target model has: {offered}; "
                "transfer between models of one kind, decoder-only or encoder-decoder"
            )
        keys = tuple(site.key for site in geometry.sites if site.key.site in names)
        return PromptSpace(self.kind, self.length, geometry, None if len(keys) == len(geometry.sites) else keys)

    @property
    def pieces(self) -> dict[tuple[str, int, str], int]:
        """What a row of the table consists of, in order: ``(site, layer, "keys" | "values") -> w``."""
        if self.kind == "embedding":
            return {("", 0, "embeddings"): self.geometry.width}
        found: dict[tuple[str, int, str], int] = {}
        for site in self.geometry.reached(self.layers):
            found[site.key.site, site.key.layer, "keys"] = site.kv_heads * site.key_size
            found[site.key.site, site.key.layer, "values"] = site.kv_heads * site.value_size
        return found


def depth_map(source_layers: Sequence[int], target_layers: Sequence[int]) -> dict[int, int]:
    """Which source layer each target layer takes after: the one at the nearest relative depth.

    First to first and last to last; a single target layer takes after the last one, which is nearest to the output.
    """
    last = len(source_layers) - 1
    steps = max(len(target_layers) - 1, 1)
    places = [place * last / steps if len(target_layers) > 1 else last for place in range(len(target_layers))]
    return {layer: source_layers[int(place + 0.5)] for layer, place in zip(target_layers, places, strict=True)}


@final
class Projector(nn.Module):
    """A map from the prompts of one model to those of another.

    Args:
        source: Space of what goes in.
        target: Space of what comes out, of the same kind and length.
        config: Its layers.
        seed: Of its initial weights.
        norm_scale: Initial spread of what comes out of a LayerNorm. The paper's is 1, which suits T5, whose word
            embeddings are that large; give the spread of the target's word embeddings.

    Attributes:
        nets: One map per piece of the target.
        source_places: For each of them, which piece of the source it reads.

    Raises:
        PromptMismatchError: The spaces are of different kinds, or the target reaches attentions that the source lacks.
        LengthError: They have different lengths.
    """

    def __init__(
        self,
        source: PromptSpace,
        target: PromptSpace,
        config: ProjectorConfig,
        *,
        seed: int = 0,
        norm_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if source.kind != target.kind:
            raise PromptMismatchError(f"a projector turns no {source.kind} prompt into one of kind {target.kind}")
        if source.length != target.length:
            raise LengthError(
                f"a projector keeps the length of a prompt, but the source has {source.length} positions and the "
                f"target {target.length}; train both alike"
            )
        self.source, self.target, self.config = source, target, config
        self.source_places = _sources_of_pieces(source, target)
        given, wanted = list(source.pieces.values()), list(target.pieces.values())
        norm = config.norm == "layer" or (config.norm == "auto" and source.kind == "embedding")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            nets = [
                _net(config, source.length, given[place], width)
                for place, width in zip(self.source_places, wanted, strict=True)
            ]
        self.nets = nn.ModuleList(nets)
        norms = [nn.LayerNorm(width) for width in wanted] if norm else []
        for layer in norms:
            nn.init.constant_(layer.weight, norm_scale)
        self.norms = nn.ModuleList(norms)

    def forward(self, table_PW: Tensor) -> Tensor:
        """Map a table ``[P, W]`` of the source to one of the target ``[P, W']``."""
        parts = table_PW.split(list(self.source.pieces.values()), dim=1)
        mapped = [net(parts[place]) for net, place in zip(self.nets, self.source_places, strict=True)]
        if self.norms:
            mapped = [norm(part) for norm, part in zip(self.norms, mapped, strict=True)]
        return torch.cat(mapped, dim=1)


class _Whole(nn.Module):
    """A map of all positions at once."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.width = inner, width

    def forward(self, part_Pw: Tensor) -> Tensor:
        mapped_Pw: Tensor = self.inner(part_Pw.flatten()).view(part_Pw.shape[0], self.width)
        return mapped_Pw


def _net(config: ProjectorConfig, length: int, given: int, wanted: int) -> nn.Module:
    if config.kind == "linear":
        return nn.Linear(given, wanted)
    activation = nn.LeakyReLU() if config.activation == "leaky_relu" else nn.Tanh()
    positions = length if config.kind == "flatten" else 1
    layers = nn.Sequential(
        nn.Linear(positions * given, config.hidden_size),
        activation,
        nn.Linear(config.hidden_size, positions * wanted),
    )
    return _Whole(layers, wanted) if config.kind == "flatten" else layers


def _sources_of_pieces(source: PromptSpace, target: PromptSpace) -> list[int]:
    """For every piece of the target the place of the source's piece that it is made from."""
    offered = list(source.pieces)
    by_site: dict[str, list[int]] = {}
    for site, layer, _ in offered:
        if layer not in by_site.setdefault(site, []):
            by_site[site].append(layer)
    found = []
    for site, group in itertools.groupby(target.pieces, key=lambda piece: piece[0]):
        if site not in by_site:
            raise PromptMismatchError(
                f"the source prompts have nothing for '{site}' attention; known: {sorted(by_site)}"
            )
        pieces = list(group)
        layers = depth_map(by_site[site], list(dict.fromkeys(layer for _, layer, _ in pieces)))
        found += [offered.index((site, layers[layer], what)) for _, layer, what in pieces]
    return found


class _Projected(nn.Module):
    """A parametrization: the projector's answer to one source prompt. Only the projector is trained."""

    def __init__(self, projector: Projector, source_PW: Tensor) -> None:
        super().__init__()
        self.projector = projector
        self.register_buffer("source_PW", source_PW, persistent=False)

    def forward(self) -> Tensor:
        table_PW: Tensor = self.projector(self.source_PW)
        return table_PW


def projected_prompt(projector: Projector, source: SoftPrompt) -> SoftPrompt:
    """Make the target model's prompt out of a source prompt; gradients flow to the projector alone.

    ``fold()`` of the result is an ordinary prompt.

    Raises:
        PromptMismatchError: The prompt does not lie in the space that the projector was made for.
    """
    space = PromptSpace.of(source)
    if space != projector.source:
        raise PromptMismatchError(
            f"the projector is for {_words(projector.source)}, not for {_words(space)}; train one for these prompts"
        )
    target = projector.target
    parametrization = _Projected(projector, source.table_PW)
    return KINDS[target.kind](target.geometry, parametrization, target.length, target.layers, source.placement)


def _words(space: PromptSpace) -> str:
    layers = "all" if space.layers is None else str(len(space.layers))
    return (
        f"{space.kind} prompts of length {space.length} on a {space.geometry.family} of width {space.geometry.width} "
        f"with {len(space.geometry.sites)} layers ({layers} of them reached)"
    )


def projection_distance(projector: Projector, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean squared error between projected prompts and the target model's own (the paper's distance objective).

    Args:
        projector: The map.
        pairs: Tables ``(source [P, W], own prompt of the target [P, W'])``, one pair per task.

    Returns:
        A scalar: the sum over the pairs of their mean squared errors.
    """
    distances = [functional.mse_loss(projector(source_PW), own_PW) for source_PW, own_PW in pairs]
    return torch.stack(distances).sum()
