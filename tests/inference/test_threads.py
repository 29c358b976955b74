"""Threads of a pass: the plan comes from times, the engine keeps to it and sets the number back."""

from __future__ import annotations

import threading

import pytest
import torch
import transformers

from conftest import SIZES, byte_tokenizer
from serving_requests import fifteen, staggered, tiny_service, word_prompt, words
from softprompts.inference import (
    EngineThread,
    PromptPool,
    Request,
    SamplingOptions,
    ServingEngine,
    ServingLimits,
    ThreadPlan,
    measure_threads,
)
from softprompts.inference.passes import SlotForward
from softprompts.inference.threads import computing, plan_threads
from softprompts.models import FrozenLM

PLAN = ThreadPlan(3, ((4, 1), (16, 2)))


class Number(threading.local):
    """Of every thread, as torch's."""

    now = 4


@pytest.fixture
def number(monkeypatch):
    """A number of threads that is set and read, while one thread computes: more of them would disturb each other."""
    held = Number()
    monkeypatch.setattr(torch, "get_num_threads", lambda: held.now)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: setattr(held, "now", threads))
    return held


@pytest.fixture
def threads_set_back():
    """Torch's own number, as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def served():
    with tiny_service("llama") as found:
        yield found


@pytest.fixture
def passes(monkeypatch):
    """Tokens and threads of all passes in slots."""
    seen: list[tuple[int, int]] = []
    plain = SlotForward.__call__

    def watched(self, works):
        seen.append((sum(work.tokens for work in works), torch.get_num_threads()))
        return plain(self, works)

    monkeypatch.setattr(SlotForward, "__call__", watched)
    return seen


class Clock:
    """On which a pass takes as long as ``seconds`` says for the number of threads that is set."""

    def __init__(self, seconds):
        self.now, self.seconds = 0.0, seconds

    def __call__(self):
        self.now += self.seconds(torch.get_num_threads())
        return self.now


def test_a_plan_answers_for_every_size():
    assert [PLAN.threads(tokens) for tokens in (1, 4, 5, 16, 17, 9999)] == [1, 1, 2, 2, 3, 3]
    assert PLAN.numbers == [1, 2, 3]
    assert str(PLAN) == "1 thread up to 4 tokens a pass, 2 up to 16, 3 above"
    assert (str(ThreadPlan(1)), str(ThreadPlan(2))) == ("1 thread", "2 threads")


@pytest.mark.parametrize(
    ("seconds", "plan"),
    [
        ({}, ThreadPlan(4)),
        ({1: {1: 1.0, 4: 2.0}, 8: {1: 3.0, 4: 4.0}}, ThreadPlan(1)),
        ({1: {1: 2.0, 4: 1.0}, 8: {1: 4.0, 4: 3.0}}, ThreadPlan(4)),
        ({1: {1: 1.0, 2: 0.95, 4: 0.9}}, ThreadPlan(1)),  # threads that save next to nothing are left to others
        ({2: {1: 1.0, 2: 1.1, 4: 1.2}, 8: {1: 2.0, 2: 1.0, 4: 1.5}}, ThreadPlan(2, ((4, 1),))),
        ({1: {1: 1.0, 4: 2.0}, 16: {1: 9.0, 4: 3.0}, 64: {}}, ThreadPlan(4, ((4, 1),))),
        ({1: {1: 1.0, 4: 2.0}, 16: {}, 64: {}}, ThreadPlan(4, ((4, 1),))),
        # one time that is off does not take the larger sizes with it
        ({1: {1: 1.3, 4: 1.0}, 4: {1: 1.0, 4: 2.0}, 16: {1: 1.0, 4: 2.0}}, ThreadPlan(1)),
    ],
)
def test_the_plan_takes_what_is_fastest(seconds, plan):
    assert plan_threads(seconds, 4) == plan


def test_measuring_runs_passes_of_the_sizes_that_it_names(served, passes, number):
    limits = ServingLimits(max_rows=32, tokens_per_step=300)
    slow_alone = measure_threads(served[0], limits, clock=Clock(lambda threads: 1e-3 / threads))
    assert slow_alone == ThreadPlan(4)
    assert {tokens for tokens, _ in passes} >= {1, 8, 32, 128}
    assert {tokens for tokens, _ in passes} <= {1, 2, 4, 8, 32, 128, 5}  # and those of the check that slots are exact
    assert {threads for tokens, threads in passes if tokens == 32} == {1, 2, 4}
    assert number.now == 4
    assert measure_threads(served[0], limits, clock=Clock(lambda threads: 1e-3 * threads)) == ThreadPlan(1)


def test_where_the_time_is_over_all_threads_compute(served, number):
    assert measure_threads(served[0], clock=Clock(lambda threads: 9.0 * threads)) == ThreadPlan(4)
    assert number.now == 4
    some = measure_threads(served[0], clock=Clock(lambda threads: 0.005 * threads))
    assert (some.threads(1), some.threads(512)) == (1, 4)


def test_rows_that_the_memory_does_not_hold_are_not_tried(served, passes, number):
    per_column = served[0].geometry.prefix_width * 4
    tight = ServingLimits(max_rows=32, cache_bytes=256 * per_column)
    assert measure_threads(served[0], tight, clock=Clock(lambda threads: 1e-3 * threads)).threads(128) == 1
    assert max(tokens for tokens, _ in passes) <= 256
    nothing = ServingLimits(cache_bytes=per_column)
    assert measure_threads(served[0], nothing) == ThreadPlan(4)


def test_other_models_and_single_threads_are_not_measured(number):
    model = transformers.BloomForCausalLM(transformers.BloomConfig(**{**SIZES, "n_layer": 2, "n_head": 4}))
    bloom = FrozenLM.from_model(model, byte_tokenizer())
    assert measure_threads(bloom, clock=Clock(lambda threads: 1e-3 * threads)) == ThreadPlan(4)
    number.now = 1
    assert measure_threads(bloom) == ThreadPlan(1)


def test_the_engine_keeps_to_its_plan_and_sets_the_number_back(served, passes, number):
    engine = ServingEngine(*served, ServingLimits(max_rows=6, tokens_per_step=64), threads=PLAN)
    passes.clear()
    planned = staggered(engine, fifteen())
    assert all(threads == PLAN.threads(tokens) for tokens, threads in passes)
    assert {threads for _, threads in passes} == {1, 2, 3}
    assert number.now == 4
    plain = ServingEngine(*served, ServingLimits(max_rows=6, tokens_per_step=64))
    passes.clear()
    assert staggered(plain, fifteen()) == planned
    assert {threads for _, threads in passes} == {4}


def test_a_pass_that_fails_sets_the_number_back(number):
    with pytest.raises(ValueError, match="broken"), computing(ThreadPlan(1), 5):
        raise ValueError("broken")
    assert number.now == 4


def test_the_thread_of_a_server_keeps_to_the_plan(served, passes, threads_set_back):
    frozen, pool = served
    done = threading.Event()
    engine = ServingEngine(frozen, pool, threads=ThreadPlan(1))
    passes.clear()
    torch.set_num_threads(2)
    with EngineThread(engine) as thread:
        thread.submit(Request("a", (1, 2, 3), None, SamplingOptions(max_tokens=4)), lambda event: _end(event, done))
        assert done.wait(60)
    assert {threads for _, threads in passes} == {1}
    assert torch.get_num_threads() == 2


def _end(event, done):
    if event.finish_reason is not None:
        done.set()


def test_prompts_are_folded_with_all_threads_whatever_a_pass_has_set(served, monkeypatch, threads_set_back):
    frozen = served[0]
    seen: list[int] = []
    plain = FrozenLM.activations

    def watched(self, *args):
        seen.append(torch.get_num_threads())
        return plain(self, *args)

    torch.set_num_threads(2)
    with PromptPool(frozen) as pool:
        prompt = word_prompt(frozen, words(3), "embedding")
        monkeypatch.setattr(FrozenLM, "activations", watched)
        with computing(ThreadPlan(1), 1):  # a pass runs when the pool's thread begins
            pool.add("late", prompt)
            pool.wait("late")
    assert seen == [2]
