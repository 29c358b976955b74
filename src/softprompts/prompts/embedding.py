"""Prompt tuning (Lester et al. 2021): learned embeddings in front of the input."""

from __future__ import annotations

from typing import final

from softprompts.prompts.base import SoftPrompt
from softprompts.types import Geometry, PromptStates

__all__ = ["EmbeddingPrompt"]


@final
class EmbeddingPrompt(SoftPrompt):
    """P learned vectors of the size of an input embedding (Lester et al. 2021, section 2)."""

    kind = "embedding"

    @staticmethod
    def row_width(geometry: Geometry) -> int:
        """D."""
        return geometry.width

    def forward(self) -> PromptStates:
        """Return ``embeddings_PD``."""
        return PromptStates(length=self.length, embeddings_PD=self.table())
