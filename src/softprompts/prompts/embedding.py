"""Prompt tuning (Lester et al. 2021): learned embeddings in front of the input."""

from __future__ import annotations

from collections.abc import Collection
from typing import final

from softprompts.prompts.base import SoftPrompt
from softprompts.types import Geometry, LayerKey, PromptStates

__all__ = ["EmbeddingPrompt"]


@final
class EmbeddingPrompt(SoftPrompt):
    """P learned vectors of the size of an input embedding (Lester et al. 2021, section 2).

    In front of the text of a decoder-only model, or of an encoder's.
    """

    kind = "embedding"

    @staticmethod
    def row_width(geometry: Geometry, layers: Collection[LayerKey] | None = None) -> int:
        """D: this kind of prompt stands in front of all layers."""
        return geometry.width

    def forward(self) -> PromptStates:
        """Return ``embeddings_PD``."""
        return PromptStates(length=self.length, embeddings_PD=self.table(), infix=self.is_infix)
