"""`bench generate`: the same rows for everybody, and the same outputs as PEFT's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest

from softprompts.bench import GenerateBench, measure_generation
from softprompts.errors import ConfigError
from softprompts.models import FrozenLM


@pytest.mark.parametrize("case", ["mixed-32", "shared-32", "single"])
def test_peft_generates_the_same(case: str, tiny_frozen: Callable[[str], FrozenLM]):
    pytest.importorskip("peft")
    report = measure_generation(tiny_frozen("gpt2"), GenerateBench(case, new_tokens=4, repeats=1, peer_rows=2))
    assert report["outputs_equal"] == 1.0
    assert report["peer_rows"] == {"mixed-32": 2, "shared-32": 32, "single": 1}[case]
    assert report["ratio_plain"] == pytest.approx(report["tokens_per_s"] / report["plain_tokens_per_s"])
    assert report["ratio_peer"] == pytest.approx(report["tokens_per_s"] / report["peer_tokens_per_s"])


def test_without_peft_its_columns_stay_empty(tiny_frozen: Callable[[str], FrozenLM], monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    report = measure_generation(tiny_frozen("gpt2"), GenerateBench("single", new_tokens=2, repeats=1))
    assert report["ratio_peer"] is report["outputs_equal"] is None
    assert "pip install peft" in report["peer_missing"]
    assert report["tokens_per_s"] > 0


def test_mistakes(tiny_frozen: Callable[[str], FrozenLM]):
    with pytest.raises(ConfigError, match="mixed-32"):
        measure_generation(tiny_frozen("gpt2"), GenerateBench("mixed"))
    with pytest.raises(ConfigError, match="--new-tokens"):
        measure_generation(tiny_frozen("gpt2"), GenerateBench(new_tokens=0))
