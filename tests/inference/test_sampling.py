"""What is forbidden, how distributions are narrowed and how tokens are drawn: pure functions, no model."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from softprompts.config import DecodingConfig
from softprompts.errors import ConfigError
from softprompts.inference.sampling import (
    Constraints,
    banned_sequences,
    check_banned,
    check_decoding,
    draw,
    warp,
)

CPU = torch.device("cpu")


def constraints(histories, banned=(), *, eos_id=0, min_new_tokens=0, vocab_size=6):
    return Constraints(
        histories, banned=banned, eos_id=eos_id, min_new_tokens=min_new_tokens, vocab_size=vocab_size, device=CPU
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 100])
@pytest.mark.parametrize("top_p", [0.1, 0.7, 1.0])
def test_warp_equals_transformers_warpers(temperature, top_k, top_p):
    logits_RV = torch.randn(7, 40, generator=torch.Generator().manual_seed(0)) * 3
    logits_RV[0, :10] = logits_RV[0, 10]  # ties
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    config = DecodingConfig(strategy="sample", temperature=temperature, top_k=top_k, top_p=top_p)
    assert torch.equal(warp(logits_RV, config), warpers(None, logits_RV.clone()))


@settings(deadline=None, max_examples=60)
@given(
    history=st.lists(st.integers(1, 5), min_size=1, max_size=8),
    banned=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), max_size=4),
    generated=st.integers(0, 4),
    min_new_tokens=st.integers(0, 3),
)
def test_constraints_equal_transformers_processors(history, banned, generated, min_new_tokens):
    generated = min(generated, len(history) - 1)
    start = history[: len(history) - generated]
    ours = constraints([start], [*banned, [0]], min_new_tokens=min_new_tokens)
    if {1, 2, 3, 4, 5} <= {sequence[0] for sequence in banned if len(sequence) == 1}:
        return
    for token in history[len(start) :]:
        ours.follow(torch.tensor([0]), torch.tensor([token]))
    mask_RV = ours.forbidden(generated)
    theirs = LogitsProcessorList([MinNewTokensLengthLogitsProcessor(len(start), min_new_tokens, 0)])
    theirs.append(NoBadWordsLogitsProcessor([*banned, [0]], eos_token_id=0) if banned else lambda ids, scores: scores)
    scores = theirs(torch.tensor([history]), torch.zeros(1, 6))
    expected = torch.isinf(scores)
    assert torch.equal(torch.zeros(1, 6, dtype=torch.bool) if mask_RV is None else mask_RV.expand(1, 6), expected)


def test_constraints_follow_their_row():
    ours = constraints([[1, 2], [3, 4]], [[2, 5], [4, 3, 1]])
    assert ours.forbidden(0).tolist() == [[False] * 5 + [True], [False] * 6]
    ours.follow(torch.tensor([1, 0, 1]), torch.tensor([3, 2, 2]))
    mask_RV = ours.forbidden(1)
    assert mask_RV[0].nonzero().tolist() == [[1]]  # 4, 3 -> not 1
    assert mask_RV[1].nonzero().tolist() == [[5]]  # 2 -> not 5
    assert mask_RV[2].nonzero().tolist() == [[5]]


def test_bans_that_leave_nothing_are_refused():
    with pytest.raises(ConfigError, match="outside the vocabulary of 6"):
        check_banned([[6]], eos_id=0, vocab_size=6)
    with pytest.raises(ConfigError, match="every token"):
        check_banned([[1], [2], [3], [4], [5]], eos_id=0, vocab_size=6)


def test_banned_strings_are_tokens_or_sequences():
    words = {"\n": [10], "\n\n": [11], " dog": [7, 8], "a": [1]}

    def tokenize(text):
        """Byte-pair style: the longest word first, nothing special at the start of a text."""
        ids = []
        while text:
            word = next(word for word in sorted(words, key=len, reverse=True) if text.startswith(word))
            ids, text = ids + words[word], text[len(word) :]
        return ids

    assert banned_sequences(["\n", "\n\n", " dog", "\n"], tokenize) == ((10,), (11,), (7, 8))
    # SentencePiece puts a word mark in front of every text; within a text the newline comes alone.
    assert banned_sequences(["\n"], lambda text: [99, *tokenize(text)]) == ((99, 10), (10,))
    with pytest.raises(ConfigError, match="no token"):
        banned_sequences([""], tokenize)


def test_draw_inverts_the_distribution():
    logits_RV = torch.tensor([[0.0, 0.25, 0.0, 0.75]]).log().repeat(6, 1)
    drawn = draw(logits_RV, [0.0, 0.1, 0.2499, 0.2501, 0.9, 1 - 2**-53])
    assert drawn.tolist() == [1, 1, 1, 3, 3, 3]


def test_draw_has_the_right_frequencies():
    logits_V = torch.tensor([0.1, 0.0, 0.6, 0.3]).log()
    rng = random.Random(0)
    drawn = draw(logits_V.repeat(20000, 1), [rng.random() for _ in range(20000)])
    shares = drawn.bincount(minlength=4) / 20000
    assert shares[1] == 0
    assert torch.allclose(shares, logits_V.exp(), atol=0.012)  # 3.5 standard errors


def test_min_new_tokens_hold_the_end_back():
    ours = constraints([[1]], min_new_tokens=2)
    assert ours.forbidden(0).nonzero()[:, 1].tolist() == [0]
    assert ours.forbidden(1).nonzero()[:, 1].tolist() == [0]
    assert ours.forbidden(2) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens is 9, more than max_new_tokens 8"),
        ({"beams": 0}, "beams is 0"),
        ({"temperature": 0.0}, "strategy greedy"),
        ({"temperature": 101.0}, "at most 100"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_senseless_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        check_decoding(DecodingConfig(**options))
