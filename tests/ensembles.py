"""Tiny frozen models of both shapes, and members of an ensemble that have as little in common as they may."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from conftest import byte_tokenizer, tiny_model
from softprompts.config import InitConfig, PromptConfig
from softprompts.models import FrozenLM
from softprompts.prompts import SoftPrompt, build_prompt
from softprompts.types import Encoded, Example
from zoo_seq2seq import tiny_seq2seq, with_end

SHAPES = ("gpt2", "llama", "t5", "bart")
"""Learned and rotary positions; an encoder-decoder with relative positions and one with learned ones."""
TEXTS = ("the cat", "A", "one two three four", "0123", "zz")
"""Inputs of different lengths: rows of a batch have pads on the left."""


@cache
def frozen_of(shape: str) -> FrozenLM:
    """One model per shape for all tests; never change it."""
    if shape in ("t5", "bart"):
        return FrozenLM.from_model(tiny_seq2seq(shape), with_end(byte_tokenizer()), name=f"tiny-{shape}")
    return FrozenLM.from_model(tiny_model(shape), byte_tokenizer(), name=f"tiny-{shape}")


def members_of(frozen: FrozenLM) -> list[SoftPrompt]:
    """Prefixes of two lengths and an embedding prompt."""
    made = (("prefix", 3), ("embedding", 5), ("prefix", 6))
    start = InitConfig(name="uniform", scale=1.5)
    return [
        build_prompt(PromptConfig(kind=kind, length=length, initializer=start), frozen, seed=seed)
        for seed, (kind, length) in enumerate(made)
    ]


def rows_of(frozen: FrozenLM, texts: Sequence[str] = TEXTS, choices: tuple[str, ...] = ()) -> list[Encoded]:
    """Inputs without targets."""
    ids = [(*frozen.tokenize(text), *(frozen.end_ids or ())) for text in texts]
    return [
        Encoded(own, len(own), Example(text, "", (text,), choices, id=text))
        for own, text in zip(ids, texts, strict=True)
    ]
