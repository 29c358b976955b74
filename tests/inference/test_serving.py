"""The serving engine against transformers one by one: who runs beside a request never changes its answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from conftest import SIZES, byte_tokenizer, tiny_model
from serving_requests import expected, fifteen, small, staggered, text_of, tiny_service, word_prompt, words
from softprompts.config import DecodingConfig
from softprompts.errors import ConfigError, LengthError, QueueFullError, UnknownPromptError
from softprompts.inference import (
    Engine,
    PromptPool,
    Request,
    SamplingOptions,
    ServingEngine,
    ServingLimits,
    collect,
)
from softprompts.models import FrozenLM
from softprompts.prompted import PromptedLM
from softprompts.types import Encoded, Example


@pytest.fixture(scope="module", params=["gpt2", "llama", "opt"])
def family(request):
    """A frozen model with its pool, and a second copy that only transformers touches."""
    with tiny_service(request.param) as found:
        yield *found, tiny_model(request.param)


@pytest.fixture(scope="module")
def served():
    """One family with its pool, where one is enough."""
    with tiny_service("llama") as found:
        yield found


def ids_of(outputs):
    return {name: output.ids for name, output in outputs.items()}


def test_a_mixed_continuous_batch_equals_transformers_one_by_one(family):
    frozen, pool, model = family
    requests = fifteen()
    engine = ServingEngine(frozen, pool, ServingLimits(max_rows=6, tokens_per_step=64))
    assert engine.continuous
    assert ids_of(staggered(engine, requests)) == {request.id: expected(model, request) for request in requests}


def test_inputs_read_in_pieces_equal_inputs_read_whole(served):
    frozen, pool = served
    whole = staggered(ServingEngine(frozen, pool, ServingLimits(tokens_per_step=4096)), fifteen())
    assert staggered(ServingEngine(frozen, pool, small(max_rows=3, tokens_per_step=4)), fifteen()) == whole


def test_rows_that_lose_their_place_are_answered_as_if_they_had_not(served):
    frozen, pool = served
    whole = staggered(ServingEngine(frozen, pool), fifteen(max_tokens=30))
    per_column = frozen.geometry.prefix_width * 4
    engine = ServingEngine(frozen, pool, small(cache_bytes=384 * per_column))
    assert staggered(engine, fifteen(max_tokens=30)) == whole
    assert engine.stats().preemptions > 0
    assert engine.stats().cache_used == 0


@pytest.mark.parametrize("prompt", ["words-5", "words-100", None])
def test_a_served_answer_equals_an_evaluated_one(served, prompt):
    """Greedy and drawn: the same rows through the offline engine."""
    frozen, pool = served
    prompts = [] if prompt is None else [word_prompt(frozen, words(int(prompt.split("-")[1])), "prefix")]
    inputs = [tuple(words(length)) for length in (3, 8, 15)]
    rows = [Encoded(ids, len(ids), Example("", ""), len(prompts) - 1) for ids in inputs]
    sampling = {"temperature": 0.9, "top_k": 20, "top_p": 0.95}
    for decoding, options in (
        (DecodingConfig(max_new_tokens=12), SamplingOptions(max_tokens=12, logprobs=0)),
        (
            DecodingConfig(strategy="sample", max_new_tokens=12, min_new_tokens=6, **sampling),
            SamplingOptions(max_tokens=12, min_tokens=6, logprobs=0, seed=3, **sampling),
        ),
    ):
        offline = [Engine(PromptedLM(frozen, prompts)).generate([row], decoding, seed=3)[0] for row in rows]
        requests = [Request(str(number), ids, prompt, options) for number, ids in enumerate(inputs)]
        for one, (output,) in zip(offline, ServingEngine(frozen, pool).generate(requests), strict=True):
            assert (output.ids, output.text) == (one.ids, one.text)
            assert output.finish_reason == ("stop" if one.finished else "length")
            assert sum(token.logprob for token in output.logprobs) == pytest.approx(one.logprob, rel=1e-4)


def test_samples_depend_on_their_seed_and_number_alone(served):
    frozen, pool = served
    options = SamplingOptions(max_tokens=10, temperature=1.0, seed=7, n=3)
    request = Request("drawn", tuple(words(6)), "words-5", options)
    (alone,) = ServingEngine(frozen, pool).generate([request])
    (*_, crowded) = ServingEngine(frozen, pool, small()).generate([*fifteen(temperature=1.0, n=2), request])
    assert [output.ids for output in crowded] == [output.ids for output in alone]
    assert len({output.ids for output in alone}) == 3
    (other,) = ServingEngine(frozen, pool).generate([replace(request, options=replace(options, seed=8))])
    assert [output.ids for output in other] != [output.ids for output in alone]
    unseeded = replace(request, options=replace(options, seed=None))
    assert ServingEngine(frozen, pool).generate([unseeded]) != ServingEngine(frozen, pool).generate([unseeded])


def test_a_cancelled_request_ends_and_the_others_do_not_notice(served):
    frozen, pool = served
    requests = fifteen()[:6]
    whole = staggered(ServingEngine(frozen, pool), requests)
    engine = ServingEngine(frozen, pool, small(max_rows=4))
    for request in requests:
        pool.wait(request.prompt) if request.prompt else None
        engine.submit(request)
    events = [event for _ in range(6) for event in engine.step()]
    assert engine.cancel("r0") or "r0" not in {event.request_id for event in events if not event.finish_reason}
    assert engine.cancel("r5")  # it waits
    assert not engine.cancel("nobody")
    while engine.busy:
        events += engine.step()
    outputs = {name: collect([event for event in events if event.request_id == name]) for name in whole}
    assert outputs["r5"].finish_reason == "cancelled"
    assert {name: outputs[name] for name in whole if name not in ("r0", "r5")} == {
        name: whole[name] for name in whole if name not in ("r0", "r5")
    }
    assert engine.stats().cache_used == 0
    assert pool.stats().in_use == 0


def test_logprobs_are_those_of_the_model(served):
    frozen, pool = served
    (request,) = [request for request in fifteen(logprobs=3) if request.id == "r7"]
    ((output,),) = ServingEngine(frozen, pool).generate([request])
    ids = [*text_of(request), *output.ids]
    logits_TV = frozen.causal.own_logits(torch.tensor([ids]))[0]
    logprobs_TV = logits_TV.log_softmax(dim=-1)
    first = len(text_of(request)) - 1
    assert len(output.logprobs) == len(output.ids)
    for place, token in enumerate(output.logprobs):
        best = logprobs_TV[first + place].topk(3)
        assert token.id == output.ids[place] == token.top[0][0]
        assert token.logprob == pytest.approx(float(logprobs_TV[first + place, token.id]), abs=1e-3)
        assert [one for one, _ in token.top] == best.indices.tolist()
        assert [value for _, value in token.top] == pytest.approx(best.values.tolist(), abs=1e-3)


def test_options_that_forbid_and_end(served):
    frozen, pool = served
    ids = tuple(words(9))
    ((free,),) = ServingEngine(frozen, pool).generate([Request("a", ids, None, SamplingOptions(max_tokens=12))])
    first, later = free.ids[0], free.ids[3]

    def answer(**options):
        ((output,),) = ServingEngine(frozen, pool).generate(
            [Request("a", ids, None, SamplingOptions(max_tokens=12, **options))]
        )
        return output

    stopped = answer(stop_ids=(later,))
    place = free.ids.index(later)
    assert (stopped.ids, stopped.finish_reason, stopped.stop_reason) == (free.ids[:place], "stop", later)
    assert answer(stop_ids=(later,), min_tokens=place).ids == stopped.ids
    assert len(answer(stop_ids=(later,), min_tokens=place + 1).ids) > place
    assert first not in answer(banned_ids=((first,),)).ids
    assert answer(banned_ids=((ids[-1], first),)).ids[0] != first
    assert answer(banned_ids=((ids[-1] - 1, first),)).ids[0] == first
    assert answer(logit_bias={65: 1e4}).ids == (65,) * 12


def test_a_prompt_that_gives_no_numbers_harms_nobody_else(served):
    frozen, _ = served
    poisoned = word_prompt(frozen, words(4), "prefix")
    with torch.no_grad():
        for parameter in poisoned.parameters():
            parameter.fill_(1e38)
    requests = [Request(f"q{number}", tuple(words(5)), None, SamplingOptions(max_tokens=20)) for number in range(4)]
    whole = ServingEngine(frozen).generate(requests)
    with PromptPool(frozen) as pool:
        pool.add("poisoned", poisoned)
        pool.wait("poisoned")
        engine = ServingEngine(frozen, pool, small(max_rows=2))
        engine.submit(Request("bad", tuple(words(6)), "poisoned", SamplingOptions(max_tokens=20)))
        events = []
        for request in requests:
            engine.submit(request)
        while engine.busy:
            events += engine.step()
    bad = collect([event for event in events if event.request_id == "bad"])
    assert (bad.finish_reason, bad.ids) == ("error", ())
    others = [[collect([event for event in events if event.request_id == request.id])] for request in requests]
    assert others == whole


def test_what_cannot_be_answered_is_refused_before_anything_runs(served):
    frozen, pool = served
    engine = ServingEngine(frozen, pool, ServingLimits(max_rows=2, max_waiting=1))
    good = SamplingOptions(max_tokens=5)
    for request, error, said in (
        (Request("a", (), None, good), LengthError, "no input"),
        (Request("a", (1,), "nobody", good), UnknownPromptError, "nobody"),
        (Request("a", (1, 260), None, good), ConfigError, "no tokens"),
        (Request("a", (1,) * 152, "words-100", good), LengthError, "257 positions"),
        (Request("a", (1,), None, SamplingOptions(max_tokens=300)), LengthError, "300"),
    ):
        with pytest.raises(error, match=said):
            engine.submit(request)
    assert not engine.busy
    assert engine.room(Request("a", (1,) * 6, "words-50", good)) == 200
    for number in range(3):
        engine.submit(Request(f"a{number}", (1,), None, good))
    with pytest.raises(QueueFullError, match="ask again later"):
        engine.submit(Request("b", (1,), None, good))
    with pytest.raises(ConfigError, match="already"):
        engine.submit(Request("a1", (1,), None, good))


def test_no_row_may_change_the_rotary_embedding_of_others():
    """Scaled embeddings switch for the whole batch when one row is longer than the model's first training."""
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10_000.0}
    config = transformers.Phi3Config(
        **SIZES,
        num_key_value_heads=2,
        original_max_position_embeddings=64,
        rope_parameters={**scaling, "original_max_position_embeddings": 64, "partial_rotary_factor": 1.0},
    )
    engine = ServingEngine(FrozenLM.from_model(transformers.Phi3ForCausalLM(config).eval(), byte_tokenizer()))
    with pytest.raises(LengthError, match="there are 64"):
        engine.submit(Request("a", (1,) * 60, None, SamplingOptions(max_tokens=5)))
    engine.submit(Request("a", (1,) * 60, None, SamplingOptions(max_tokens=4)))


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"min_tokens": 101},
        {"temperature": -1},
        {"top_p": 0},
        {"n": 0},
        {"stop": ("",)},
        {"logprobs": -1},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        SamplingOptions(**options)
