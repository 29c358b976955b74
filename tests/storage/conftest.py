"""A model that is only an identity, and prompts for it: storage needs no more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from softprompts.prompts import SoftPrompt, prompt_from_table
from softprompts.storage import save_prompt
from softprompts.types import Geometry, KeyValueSite, LayerKey, MetricValue

SITES = (
    KeyValueSite(LayerKey("self", 0), kv_heads=2, key_size=4, value_size=4),
    KeyValueSite(LayerKey("self", 1), kv_heads=1, key_size=8, value_size=6, window=7),
    KeyValueSite(LayerKey("self", 2), kv_heads=3, key_size=2, value_size=2),
)
GEOMETRY = Geometry(family="llama", width=12, vocab_size=50, max_positions=64, sites=SITES)


@dataclass(frozen=True)
class Identity:
    """What storage asks of a frozen model."""

    name: str = "tiny-llama"
    fingerprint: str = "0123456789abcdef"
    tokenizer_fingerprint: str = "fedcba9876543210"
    geometry: Geometry = GEOMETRY
    quantization: str | None = None


@pytest.fixture
def model() -> Identity:
    return Identity()


@pytest.fixture
def make_prompt() -> Callable[[str], SoftPrompt]:
    def make(kind: str, length: int = 3, seed: int = 0) -> SoftPrompt:
        width = GEOMETRY.width if kind == "embedding" else GEOMETRY.prefix_width
        table_PW = torch.randn(length, width, generator=torch.Generator().manual_seed(seed))
        return prompt_from_table(kind, GEOMETRY, table_PW)

    return make


@pytest.fixture(params=["prefix", "embedding"])
def saved(
    request: pytest.FixtureRequest, tmp_path: Path, model: Identity, make_prompt: Callable[[str], SoftPrompt]
) -> Path:
    """The directory of a saved prompt, once per kind."""
    return save_prompt(
        make_prompt(request.param),
        tmp_path / "prompt",
        frozen=model,
        task="e2e",
        recipe={"training": {"seed": 3, "max_steps": 10}, "optimizer": {"learning_rate": 1e-5}},
        metrics={"bleu": MetricValue(0.68, 0.004), "loss": 1.25},
    )
