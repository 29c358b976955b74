"""What every soft prompt is: a table of numbers, one row per position, and how the table becomes states.

Kind of prompt, reparametrization and initializer are separate axes. A prompt owns one *parametrization*, a module that
yields the table ``[P, W]``; what a row of the table means is the prompt's kind.
"""

from __future__ import annotations

import abc
from collections.abc import Collection
from typing import Self

from torch import Tensor, nn

from softprompts.prompts.reparam import Direct
from softprompts.types import Geometry, LayerKey, PromptStates

__all__ = ["SoftPrompt"]


class SoftPrompt(nn.Module, abc.ABC):
    """A learned prompt for a frozen model of one geometry.

    Args:
        geometry: Shapes of the model that it is for.
        parametrization: Module whose ``forward()`` gives the table ``[P, W]``; its parameters are what is trained.
        length: P.
        layers: Where a prefix lives, if not in every layer of the model.
        placement: ``"prefix"``: in front of the text; ``"infix"``: between the input and the output.

    Attributes:
        kind: ``"embedding"`` or ``"prefix"``.
    """

    kind: str

    def __init__(
        self,
        geometry: Geometry,
        parametrization: nn.Module,
        length: int,
        layers: Collection[LayerKey] | None = None,
        placement: str = "prefix",
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.parametrization = parametrization
        self.length = length
        self.placement = placement
        # all layers by name are the same as no choice at all
        chosen = None if layers is None else tuple(site.key for site in geometry.reached(layers))
        self.layers = None if chosen is None or len(chosen) == len(geometry.sites) else chosen

    @staticmethod
    @abc.abstractmethod
    def row_width(geometry: Geometry, layers: Collection[LayerKey] | None = None) -> int:
        """W: numbers per position of this kind of prompt, on these layers (``None``: on all of them)."""

    @abc.abstractmethod
    def forward(self) -> PromptStates:
        """Return the states with gradient, unbatched, the reparametrization applied (once per step)."""

    def table(self) -> Tensor:
        """Return the table ``[P, W]`` with gradient."""
        table_PW: Tensor = self.parametrization()
        return table_PW

    @property
    def table_PW(self) -> Tensor:
        """The folded table: a detached copy of what :meth:`table` gives now."""
        return self.table().detach().clone()

    def fold(self) -> Self:
        """Drop the reparametrization: the same prompt with its table as the only parameter."""
        return type(self)(self.geometry, Direct(self.table_PW), self.length, self.layers, self.placement)

    @property
    def is_infix(self) -> bool:
        """Whether it stands between the input and the output of a row."""
        return self.placement == "infix"

    @property
    def trained_parameters(self) -> int:
        """Numbers that the optimizer changes (the reparametrization included)."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    @property
    def stored_parameters(self) -> int:
        """Numbers that are kept once training is over: P x W."""
        return self.length * self.row_width(self.geometry, self.layers)
