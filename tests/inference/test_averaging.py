"""Averaged next-token distributions against a plain loop that runs every model alone and averages by hand."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ensembles import SHAPES, TEXTS, frozen_of, members_of, rows_of
from softprompts.config import DecodingConfig
from softprompts.errors import ConfigError, LengthError
from softprompts.inference import Engine, draw, warp
from softprompts.inference.averaging import mean_logprobs
from softprompts.models import FrozenLM
from softprompts.prompted import PromptedLM
from softprompts.prompts import SoftPrompt
from softprompts.tasks.encode import collate
from softprompts.types import Encoded

ALLOWED = [97, 98, 99, 256]
BANNED = [[token] for token in range(260) if token not in ALLOWED]
"""Leaves three letters and the end, so that the random models end a text now and then."""
GREEDY = DecodingConfig(max_new_tokens=8)
SAMPLE = DecodingConfig(strategy="sample", max_new_tokens=8, temperature=0.8, top_k=3, top_p=0.9)
OPTIONS = {
    "greedy": GREEDY,
    "greedy-min": replace(GREEDY, min_new_tokens=6),
    "greedy-sequences": replace(GREEDY, banned=("aa", "bc", "tb")),
    "sample": SAMPLE,
}


def next_logits_V(frozen: FrozenLM, prompt: SoftPrompt, row: Encoded, said: Sequence[int]) -> Tensor:
    """What one model alone predicts, without a cache: the whole text is read again."""
    target = (*said, 0)
    if frozen.pair is None:
        whole = replace(row, ids=(*row.ids, *target), prompt=0)
    else:
        whole = replace(row, decoder_ids=target, prompt=0)
    with torch.no_grad():
        return PromptedLM(frozen, [prompt]).label_logits(collate([whole], pad_id=frozen.pad_id)).logits_MV[-1]


def by_hand(
    frozen: FrozenLM,
    members: Sequence[SoftPrompt],
    row: Encoded,
    decoding: DecodingConfig,
    uniform: Callable[[], float],
) -> tuple[tuple[int, ...], float, bool]:
    """Generate one text, token by token: tokens, log-probability and whether it ended."""
    history = list(row.ids) if frozen.pair is None else []
    bans = [frozen.tokenize(text) for text in decoding.banned]
    said: list[int] = []
    total = 0.0
    while len(said) < decoding.max_new_tokens:
        every_NV = torch.stack([next_logits_V(frozen, member, row, said) for member in members])
        mean_V = every_NV.float().softmax(dim=-1).mean(dim=0)
        allowed_V = torch.zeros_like(mean_V, dtype=torch.bool)
        allowed_V[ALLOWED] = True
        allowed_V[frozen.eos_id] = len(said) >= decoding.min_new_tokens
        for ban in bans:
            if (history + said)[len(history + said) - len(ban) + 1 :] == ban[:-1]:
                allowed_V[ban[-1]] = False
        scores_V = mean_V.log().masked_fill(~allowed_V, float("-inf"))
        if decoding.strategy == "sample":
            token = int(draw(warp(scores_V[None], decoding), [uniform()])[0])
        else:
            token = int(scores_V.argmax())
        total += float(mean_V[token].log())
        if token == frozen.eos_id:
            return tuple(said), total, True
        said.append(token)
    return tuple(said), total, False


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_plain_loop_over_separate_models(shape: str, name: str):
    frozen, decoding = frozen_of(shape), OPTIONS[name]
    members, rows = members_of(frozen), rows_of(frozen, TEXTS[:3])
    engine = Engine(PromptedLM(frozen, members))
    got = engine.generate(rows, decoding, averaged=[0, 1, 2], banned_ids=BANNED, seed=5)
    for index, (row, one) in enumerate(zip(rows, got, strict=True)):
        expected = by_hand(frozen, members, row, decoding, random.Random(f"5/{index}").random)
        assert (one.ids, one.finished) == (expected[0], expected[2])
        assert one.logprob == pytest.approx(expected[1], rel=1e-4, abs=1e-4)


def test_the_mean_is_the_answer_of_no_member_and_some_texts_end():
    """Otherwise the test above would prove little."""
    frozen, finished = frozen_of("gpt2"), set()
    engine, rows = Engine(PromptedLM(frozen, members_of(frozen))), rows_of(frozen)
    common = engine.generate(rows, GREEDY, averaged=[0, 1, 2], banned_ids=BANNED)
    own = [
        engine.generate([replace(row, prompt=member) for row in rows], GREEDY, banned_ids=BANNED) for member in range(3)
    ]
    assert any(one.ids not in [answers[index].ids for answers in own] for index, one in enumerate(common))
    for other in map(frozen_of, SHAPES):
        engine = Engine(PromptedLM(other, members_of(other)))
        outputs = engine.generate(rows_of(other, TEXTS[:3]), GREEDY, averaged=[0, 1, 2], banned_ids=BANNED)
        finished |= {one.finished for one in outputs}
    assert finished == {True, False}


@pytest.mark.parametrize("shape", SHAPES)
def test_requests_do_not_depend_on_their_batch(shape: str):
    frozen = frozen_of(shape)
    engine, rows = Engine(PromptedLM(frozen, members_of(frozen))), rows_of(frozen)
    outputs = [
        engine.generate(rows, replace(decoding, batch_size=size), averaged=[2, 0, 1], banned_ids=BANNED)
        for size in (1, 7, 64)
        for decoding in (GREEDY,)
    ]
    for again in outputs[1:]:
        assert [(one.ids, one.finished) for one in again] == [(one.ids, one.finished) for one in outputs[0]]
        assert [one.logprob for one in again] == pytest.approx([one.logprob for one in outputs[0]], rel=1e-4)


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLE], ids=["greedy", "sample"])
def test_copies_of_one_prompt_are_that_prompt(decoding: DecodingConfig):
    frozen = frozen_of("llama")
    engine, rows = Engine(PromptedLM(frozen, members_of(frozen))), rows_of(frozen)
    alone = engine.generate([replace(row, prompt=1) for row in rows], decoding, seed=3)
    copies = engine.generate(rows, decoding, averaged=[1, 1, 1, 1], seed=3)
    assert [(one.ids, one.text, one.finished) for one in copies] == [(one.ids, one.text, one.finished) for one in alone]
    assert [one.logprob for one in copies] == pytest.approx([one.logprob for one in alone], rel=1e-4)


def test_progress_and_order_are_those_of_the_requests():
    frozen, ready = frozen_of("gpt2"), []
    engine, rows = Engine(PromptedLM(frozen, members_of(frozen))), rows_of(frozen)
    states = engine.fold()
    got = engine.generate(rows, GREEDY, states=states, averaged=[0, 1], on_progress=ready.append)
    assert sum(ready) == len(TEXTS)
    for row, one in zip(rows, got, strict=True):
        assert engine.generate([row], GREEDY, states=states, averaged=[0, 1])[0].ids == one.ids


def test_the_mean_is_taken_of_probabilities_and_loses_no_small_one():
    logits_RV = torch.tensor([[0.0, 1.0, -200.0], [3.0, 0.0, -190.0], [5.0, 5.0, 5.0], [0.0, 0.0, 9.0]])
    got_BV = mean_logprobs(logits_RV, 2)
    by_hand_BV = logits_RV.double().softmax(dim=-1).view(2, 2, 3).mean(dim=1).log()
    torch.testing.assert_close(got_BV.double(), by_hand_BV, rtol=1e-5, atol=1e-5)
    assert bool(torch.isfinite(got_BV).all())
    assert float(got_BV[0].exp().sum()) == pytest.approx(1.0)


def test_what_cannot_be_averaged_is_refused():
    frozen = frozen_of("gpt2")
    engine, rows = Engine(PromptedLM(frozen, members_of(frozen))), rows_of(frozen)
    beam = DecodingConfig(strategy="beam", beams=3, max_new_tokens=4)
    with pytest.raises(ConfigError, match=r"beam search \(3 beams\) cannot average.*decoding.strategy=greedy"):
        engine.generate(rows, beam, averaged=[0, 1])
    with pytest.raises(ConfigError, match="names prompt 3, but 3 prompts are attached"):
        engine.generate(rows, GREEDY, averaged=[0, 3])
    # Only the longest member does not fit: 256 positions, 6 of them for prompt 2, and 18 for the longest text.
    with pytest.raises(LengthError, match="needs 257 positions: prompt 6"):
        engine.generate(rows, DecodingConfig(max_new_tokens=233), averaged=[0, 1, 2])
    assert len(engine.generate(rows[:1], replace(beam, beams=1), averaged=[0, 1])) == 1  # one beam is greedy
