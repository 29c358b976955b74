"""The beam search alone, driven by a model without a cache, against transformers and against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from softprompts.config import DecodingConfig
from softprompts.inference.beam import BeamSearch
from softprompts.inference.sampling import Constraints

EOS, VOCAB = 0, 11
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gpt2():
    """A random GPT-2 with few tokens and large weights: peaked distributions that end now and then."""
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.6,
        bos_token_id=EOS, eos_token_id=EOS, pad_token_id=EOS,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def beam_search(next_logits, inputs, config, banned=()):
    """Run the search with everything recomputed in every step. Inputs of one length."""
    search = BeamSearch(range(len(inputs)), config, eos_id=EOS, device=CPU)
    constraints = Constraints(
        inputs, banned=banned, eos_id=EOS, min_new_tokens=config.min_new_tokens, vocab_size=VOCAB, device=CPU
    )
    ids_RT = torch.tensor(inputs).repeat_interleave(search.width, dim=0)
    constraints.follow(torch.arange(len(inputs)).repeat_interleave(search.width))
    done = {}
    while len(ids_RT):
        step = search.advance(next_logits(ids_RT), constraints.forbidden(search.new_tokens))
        done.update(step.closed)
        constraints.follow(step.parents_R, step.tokens_R)
        ids_RT = torch.cat([ids_RT[step.parents_R], step.tokens_R[:, None]], dim=1)
    return [done[index] for index in range(len(inputs))]


INPUTS = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 1, 4]]


@pytest.mark.parametrize("beams", [2, 5])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.8, 2.0])
@pytest.mark.parametrize(("min_new_tokens", "banned"), [(0, ()), (3, ([3], [5, 6], [1, 2, 7]))])
def test_equals_transformers(gpt2, beams, length_penalty, min_new_tokens, banned):
    config = DecodingConfig(
        strategy="beam", beams=beams, length_penalty=length_penalty, max_new_tokens=12, min_new_tokens=min_new_tokens
    )
    ours = beam_search(lambda ids: gpt2(ids).logits[:, -1], INPUTS, config, banned)
    for start, hypothesis in zip(INPUTS, ours, strict=True):
        theirs = gpt2.generate(
            torch.tensor([start]), attention_mask=torch.ones(1, 3, dtype=torch.long), do_sample=False, num_beams=beams,
            length_penalty=length_penalty, max_new_tokens=12, min_new_tokens=min_new_tokens,
            bad_words_ids=[list(sequence) for sequence in banned] or None,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        ids = theirs.sequences[0, 3:].tolist()
        assert hypothesis.ids == tuple(ids[: ids.index(EOS)] if EOS in ids else ids)
        assert hypothesis.finished == (EOS in ids)
        length = len(hypothesis.ids) + hypothesis.finished
        score = float(theirs.sequences_scores[0])
        assert hypothesis.logprob / length**length_penalty == pytest.approx(score, rel=1e-4, abs=1e-5)


def test_logprob_is_the_models(gpt2):
    config = DecodingConfig(strategy="beam", beams=3, max_new_tokens=6)
    for start, hypothesis in zip(INPUTS, beam_search(lambda ids: gpt2(ids).logits[:, -1], INPUTS, config), strict=True):
        ids = [*start, *hypothesis.ids, *([EOS] if hypothesis.finished else [])]
        with torch.no_grad():
            logprobs_TV = gpt2(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(float(logprobs_TV[t - 1, ids[t]]) for t in range(3, len(ids)))
        assert hypothesis.logprob == pytest.approx(expected, rel=1e-5)


def test_a_full_beam_finds_the_best_text():
    """With as many beams as there are texts nothing is ever pruned, so the search equals trying them all."""
    vocabulary, limit = 4, 3
    table_VV = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(1)) * 1.5
    table_VV[:, EOS] -= 1.0
    logprobs_VV = table_VV.log_softmax(-1)
    config = DecodingConfig(strategy="beam", beams=vocabulary**limit, max_new_tokens=limit, length_penalty=0.0)
    search = BeamSearch([0], config, eos_id=EOS, device=CPU)
    last_R, done = torch.full((search.width,), 1), []
    while len(last_R):
        step = search.advance(table_VV[last_R], None)
        done += step.closed
        last_R = step.tokens_R

    def score(text):
        return sum(float(logprobs_VV[a, b]) for a, b in itertools.pairwise([1, *text]))

    texts = [text for n in range(1, limit + 1) for text in itertools.product(range(vocabulary), repeat=n)]
    complete = [t for t in texts if EOS not in t[:-1] and (t[-1] == EOS or len(t) == limit)]
    best = max(complete, key=score)
    assert (*done[0][1].ids, *([EOS] if done[0][1].finished else [])) == best
    assert done[0][1].logprob == pytest.approx(score(best), rel=1e-5)


def test_requests_leave_when_they_are_done(gpt2):
    """Later steps run fewer rows, and the others do not notice."""
    config = DecodingConfig(strategy="beam", beams=3, max_new_tokens=20)
    rows = []

    def next_logits(ids_RT):
        rows.append(len(ids_RT))
        return gpt2(ids_RT).logits[:, -1]

    together = beam_search(next_logits, INPUTS, config)
    assert rows[0] == 3 * len(INPUTS)
    assert rows[-1] < rows[0]
    alone = [beam_search(lambda ids: gpt2(ids).logits[:, -1], [start], config)[0] for start in INPUTS]
    assert [hypothesis.ids for hypothesis in together] == [hypothesis.ids for hypothesis in alone]
