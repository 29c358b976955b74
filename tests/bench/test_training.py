"""`bench train`: everybody does the same work, and what is reported is what was run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from softprompts.bench import TrainBench, measure_training
from softprompts.bench.floor import floor_step, plain_step
from softprompts.bench.measure import flops
from softprompts.bench.plain import separate_model
from softprompts.bench.workload import draw_batch
from softprompts.errors import ConfigError
from softprompts.models import FrozenLM
from softprompts.tasks.encode import IGNORED_LABEL

REQUIRED = {
    "seconds", "peer_seconds", "floor_seconds", "ratio_peer", "ratio_floor", "flops_ratio_floor", "memory_ratio_peer",
    "loss_difference", "gradient_difference",
}  # fmt: skip


def measure(frozen: FrozenLM, case: str, **options: Any) -> dict[str, Any]:
    return measure_training(frozen, TrainBench(case, **{"batch_size": 3, "repeats": 2, **options}))


@pytest.mark.parametrize(
    ("family", "case"), [("gpt2", "prefix-10-mlp"), ("gpt2", "prompt-100"), ("llama", "prompt-20")]
)
def test_peft_computes_the_same(family: str, case: str, tiny_frozen: Callable[[str], FrozenLM]):
    pytest.importorskip("peft")
    report = measure(tiny_frozen(family), case)
    assert set(report) >= REQUIRED
    assert report["peer_missing"] is None
    assert report["loss_difference"] < 1e-5
    assert 0 < report["gradient_difference"] < 1e-4
    assert report["ratio_peer"] == pytest.approx(report["peer_seconds"] / report["seconds"])
    assert report["ratio_floor"] == pytest.approx(report["seconds"] / report["floor_seconds"])
    assert report["memory_ratio_peer"] == report["peak_bytes"]["ours"] / report["peak_bytes"]["peer"]
    assert report["flops"]["peer"] > report["flops"]["ours"] > report["flops"]["floor"] > 0
    assert report["spread"]["ours"]["repeats"] == 2
    assert report["tokens"]["real"] == 150


def test_an_mlp_that_peft_has_in_another_shape_is_not_compared(tiny_frozen: Callable[[str], FrozenLM]):
    pytest.importorskip("peft")
    report = measure(tiny_frozen("llama"), "prefix-10-mlp")
    assert report["ratio_peer"] is report["gradient_difference"] is None
    assert "different functions" in report["peer_missing"]


def test_without_peft_its_columns_stay_empty(tiny_frozen: Callable[[str], FrozenLM], monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    report = measure(tiny_frozen("gpt2"), "prompt-20", repeats=1)
    assert set(report) >= REQUIRED
    assert report["peer_seconds"] is report["loss_difference"] is report["memory_ratio_peer"] is None
    assert "pip install peft" in report["peer_missing"]
    assert report["seconds"] > 0


def test_several_prompts_in_one_pass_beside_one_after_the_other(tiny_frozen: Callable[[str], FrozenLM]):
    report = measure(tiny_frozen("gpt2"), "prompts-8", repeats=1)
    assert report["ratio_separate"] == pytest.approx(report["separate_seconds"] / report["seconds"])
    assert report["flops"]["ours"] <= report["flops"]["separate"] * 1.05


def test_the_floor_is_the_model_s_own_loss_on_full_rows(tiny_frozen: Callable[[str], FrozenLM]):
    frozen = tiny_frozen("llama")
    batch = draw_batch(3, frozen, seed=1)
    # rows of one length whose last tokens are labels: what the floor makes of any batch
    ids_BT = batch.ids_BT[batch.mask_BT.bool()].view(3, 50)
    labels_BT = torch.full_like(ids_BT, IGNORED_LABEL)
    labels = int((batch.labels_BT != IGNORED_LABEL).sum())
    for row in range(3):
        count = labels // 3 + (row < labels % 3)
        labels_BT[row, 50 - count :] = ids_BT[row, 50 - count :]
    with torch.no_grad():
        expected = frozen.model(input_ids=ids_BT, labels=labels_BT).loss
    assert float(floor_step(separate_model(frozen), batch)()) == pytest.approx(float(expected), rel=1e-5)


def test_floors_in_order(tiny_frozen: Callable[[str], FrozenLM]):
    frozen = tiny_frozen("gpt2")
    batch, model = draw_batch(4, frozen, seed=0), separate_model(frozen)
    alone, longer = flops(floor_step(model, batch)), flops(floor_step(model, batch, prompt_tokens=20))
    assert alone < longer < flops(plain_step(model, batch))


def test_nothing_is_left_behind_in_the_model(tiny_frozen: Callable[[str], FrozenLM]):
    frozen = tiny_frozen("gpt2")
    before = {name: value.clone() for name, value in frozen.model.state_dict().items()}
    measure(frozen, "prompt-20", repeats=1)
    assert all(torch.equal(value, before[name]) for name, value in frozen.model.state_dict().items())
    assert frozen.training_dtype is None
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in frozen.model.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # of the compiler itself
def test_best_ways_on_both_sides(tiny_frozen: Callable[[str], FrozenLM]):
    report = measure(tiny_frozen("gpt2"), "prompt-20", best=True, repeats=1)
    assert report["precision"] == "best"
    assert {"ours: float32, eager", "ours: bfloat16 autocast, eager"} <= set(report["tried_seconds"])
    fastest = min((s, name) for name, s in report["tried_seconds"].items() if name.startswith("ours"))[1]
    assert fastest == f"ours: {report['ways']['ours']}"
    assert report["loss_difference"] < 0.02


@pytest.mark.gpu
def test_on_a_gpu(tiny_frozen: Callable[[str], FrozenLM]):
    model = separate_model(tiny_frozen("llama")).to("cuda")
    frozen = FrozenLM.from_model(model, tiny_frozen("llama").tokenizer)
    report = measure(frozen, "prompt-20")
    assert report["device"] != "cpu"
    assert report["peak_bytes"]["ours"] > 0


def test_mistakes(tiny_frozen: Callable[[str], FrozenLM]):
    with pytest.raises(ConfigError, match="prompt-100"):
        measure(tiny_frozen("gpt2"), "prompt-10")
    with pytest.raises(ConfigError, match="--repeats 0"):
        measure(tiny_frozen("gpt2"), "prompt-20", repeats=0)
