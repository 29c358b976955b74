"""``bench serve``: what it compares answers the same requests with the same tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import byte_tokenizer, tiny_model
from softprompts.bench import ServeBench, measure_serving
from softprompts.errors import ConfigError
from softprompts.models import FrozenLM


def test_engine_and_peer_write_the_same_tokens():
    frozen = FrozenLM.from_model(tiny_model("gpt2"), byte_tokenizer(), name="tiny")
    rounds: list[int] = []
    bench = ServeBench(rows=3, length=5, new_tokens=10, repeats=2)
    report = measure_serving(frozen, bench, on_round=rounds.append)
    assert rounds == [0, 1]
    assert report["outputs_equal"] == 1.0
    assert set(report["spread"]) == {"mixed", "peer", "peer_1", "one_prompt", "no_prompt", "text"}
    assert all(spread["repeats"] == 2 for spread in report["spread"].values())
    seconds = {name: spread["median"] for name, spread in report["spread"].items()}
    assert report["tokens_per_s"] == pytest.approx(3 * 10 / seconds["mixed"])
    assert report["ratio_peer"] == pytest.approx(seconds["peer"] / seconds["mixed"])
    assert report["mixing_ratio"] == pytest.approx(seconds["mixed"] / seconds["one_prompt"])
    assert (report["prompts"], report["prompt_length"], report["rows"]) == (3, 5, 3)


def test_the_peer_runs_with_one_and_with_all_threads_and_its_best_counts(monkeypatch):
    frozen = FrozenLM.from_model(tiny_model("gpt2"), byte_tokenizer(), name="tiny")
    now = [2]  # while one thread computes: two would disturb each other, and whatever else is tested just now
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[-1])
    monkeypatch.setattr(torch, "set_num_threads", now.append)
    bench = ServeBench(rows=3, length=5, new_tokens=4, repeats=1)
    report = measure_serving(frozen, bench)
    fixed = measure_serving(frozen, replace(bench, fixed_threads=True))
    assert now[-1] == 2
    medians = {number: report["spread"][f"peer_{number}"]["median"] for number in (1, 2)}
    assert report["peer_threads"] == min(medians, key=medians.__getitem__)
    assert report["spread"]["peer"]["median"] == min(medians.values())
    assert report["peer_tokens_per_s"] == pytest.approx(3 * 4 / min(medians.values()))
    assert "thread" in report["threads_plan"]
    assert report["outputs_equal"] == 1.0
    assert (fixed["threads_plan"], fixed["peer_threads"], "peer_1" in fixed["spread"]) == ("2 threads", 2, False)


def test_nothing_to_measure_is_refused():
    frozen = FrozenLM.from_model(tiny_model("gpt2"), byte_tokenizer(), name="tiny")
    with pytest.raises(ConfigError, match="expected 1 or more"):
        measure_serving(frozen, ServeBench(rows=0))
