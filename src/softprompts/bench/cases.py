"""The cases of ``bench train`` and ``bench generate``, and the prompts that they train or use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from softprompts.config import ReparamConfig
from softprompts.errors import ConfigError, nearest
from softprompts.models import FrozenLM
from softprompts.prompts import EmbeddingPrompt, PrefixPrompt, SoftPrompt
from softprompts.prompts.prefix import flatten_states
from softprompts.prompts.reparam import build_parametrization

__all__ = ["GENERATE_CASES", "TRAIN_CASES", "GenerateCase", "TrainCase", "find_case", "make_prompt"]


@dataclass(frozen=True)
class TrainCase:
    """One row of the table of training steps."""

    name: str
    kind: Literal["embedding", "prefix"]
    length: int
    """P."""
    hidden_size: int | None = None
    """Units of the MLP that the prefix is computed by; ``None``: the table itself is trained."""
    prompts: int = 1
    """Prompts that are trained at once, each on a batch of its own."""


@dataclass(frozen=True)
class GenerateCase:
    """One row of the table of generation."""

    name: str
    rows: int
    prompts: int
    """Different prefixes; the rows carry them in turns."""
    length: int = 20


Case = TypeVar("Case", TrainCase, GenerateCase)

TRAIN_CASES = (
    TrainCase("prompt-100", "embedding", 100),
    TrainCase("prompt-20", "embedding", 20),
    TrainCase("prefix-10-mlp", "prefix", 10, hidden_size=512),
    TrainCase("prefix-200", "prefix", 200),
    TrainCase("prompts-8", "embedding", 20, prompts=8),
)
GENERATE_CASES = (
    GenerateCase("mixed-32", rows=32, prompts=32),
    GenerateCase("shared-32", rows=32, prompts=1),
    GenerateCase("single", rows=1, prompts=1),
)


def find_case(name: str, cases: tuple[Case, ...]) -> Case:
    """Find a case by its name.

    Raises:
        ConfigError: There is none of that name.
    """
    known = {case.name: case for case in cases}
    if name not in known:
        raise ConfigError(f"unknown case '{name}': {nearest(name, known)}")
    return known[name]


def make_prompt(
    frozen: FrozenLM, kind: str, length: int, *, hidden_size: int | None = None, seed: int = 0
) -> SoftPrompt:
    """Make a prompt that starts from random words, as the papers do: their embeddings, or what these evoke.

    Args:
        frozen: The model that it is for.
        kind: ``embedding`` or ``prefix``.
        length: P.
        hidden_size: Of the MLP that a prefix is computed by; it starts at random.
        seed: Of the words and of the MLP.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words = torch.randint(frozen.geometry.vocab_size, (length,)).tolist()
        embeddings_PD = frozen.embed(words)
        if kind == "embedding":
            parametrization = build_parametrization(ReparamConfig(), embeddings_PD, frozen.geometry.width)
            return EmbeddingPrompt(frozen.geometry, parametrization, length)
        with torch.no_grad():
            table_PW = flatten_states(frozen.geometry, frozen.activations(embeddings_PD))
        config = ReparamConfig() if hidden_size is None else ReparamConfig("mlp", hidden_size)
        return PrefixPrompt(frozen.geometry, build_parametrization(config, table_PW, frozen.geometry.width), length)
