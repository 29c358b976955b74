"""What the numbers of a prompt look like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from softprompts.config import PromptConfig
from softprompts.models import FrozenLM
from softprompts.prompts import build_prompt, prompt_from_table
from softprompts.storage import inspection
from softprompts.storage.inspection import directory_bytes, nearest_words, norms_of_layers, norms_of_positions


def test_a_prompt_made_of_words_is_nearest_to_those_words(frozen: FrozenLM):
    ids = frozen.tokenize("soft")
    prompt = prompt_from_table("embedding", frozen.geometry, 3.0 * frozen.embed(ids))
    near = nearest_words(prompt, frozen, count=3)
    assert [position[0].id for position in near] == ids
    assert "".join(position[0].text for position in near) == "soft"
    for position in near:
        assert position[0].cosine == pytest.approx(1.0, abs=1e-5)
        assert [word.cosine for word in position] == sorted((word.cosine for word in position), reverse=True)
        assert len({word.id for word in position}) == 3


def test_searching_in_chunks_finds_the_same_words(
    tiny_frozen: Callable[..., FrozenLM], monkeypatch: pytest.MonkeyPatch
):
    frozen = tiny_frozen("llama")
    prompt = build_prompt(PromptConfig(kind="embedding", length=4), frozen, seed=0)
    whole = nearest_words(prompt, frozen, count=7)
    monkeypatch.setattr(inspection, "_CHUNK", 5)
    chunked = nearest_words(prompt, frozen, count=7)
    assert [[word.id for word in position] for position in chunked] == [[w.id for w in position] for position in whole]


def test_nearest_words_are_those_of_plain_cosine(tiny_frozen: Callable[..., FrozenLM]):
    frozen = tiny_frozen("gpt2")
    prompt = build_prompt(PromptConfig(kind="embedding", length=3), frozen, seed=5)
    words_VD = frozen.embed(range(len(frozen.tokenizer)))
    for position, vector_D in zip(nearest_words(prompt, frozen, count=4), prompt.table_PW, strict=True):
        cosines_V = torch.cosine_similarity(words_VD, vector_D[None])
        assert [word.id for word in position] == cosines_V.topk(4).indices.tolist()
        assert [word.cosine for word in position] == pytest.approx(cosines_V.topk(4).values.tolist(), abs=1e-5)


def test_asking_for_more_words_than_there_are_gives_all(tiny_frozen: Callable[..., FrozenLM]):
    frozen = tiny_frozen("gpt2")
    prompt = build_prompt(PromptConfig(kind="embedding", length=1), frozen, seed=0)
    assert {word.id for word in nearest_words(prompt, frozen, count=9999)[0]} == set(range(len(frozen.tokenizer)))


def test_norms(make_prompt):
    prefix = make_prompt("prefix")
    with torch.no_grad():
        states = {key: (keys + 0, values + 0) for key, (keys, values) in prefix().keys_values.items()}
    measured = norms_of_layers(prefix)
    assert [row.layer for row in measured] == ["self.0", "self.1", "self.2"]
    for row, (keys, values) in zip(measured, states.values(), strict=True):
        assert row.keys == pytest.approx(keys.square().sum(-1).sqrt().mean().item())
        assert row.values == pytest.approx(values.square().sum(-1).sqrt().mean().item())
    embedding = make_prompt("embedding")
    assert norms_of_layers(embedding) == []
    assert norms_of_positions(embedding) == pytest.approx(embedding.table_PW.square().sum(1).sqrt().tolist())


def test_size_on_disk(saved: Path):
    assert directory_bytes(saved) == sum(len(path.read_bytes()) for path in saved.iterdir()) > 0
