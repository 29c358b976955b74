from __future__ import annotations

import itertools

import pytest
import torch

from softprompts.pretraining.optim import BatchedMuon, build_optimizers, decay_start, orthogonalise, rate_factor
from softprompts.pretraining.recipe import LMConfig, LMOptimizerConfig, LMTrainingConfig

SHAPES = [(8, 8), (8, 8), (16, 8), (8, 24)]


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def test_batched_muon_is_torchs_muon() -> None:
    ours, theirs = parameters(), parameters()
    mine = BatchedMuon(ours, lr=0.05, momentum=0.9, weight_decay=0.1)
    reference = torch.optim.Muon(
        theirs, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True, adjust_lr_fn="original"
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    start = parameters()
    for a, b, s in zip(ours, theirs, start, strict=True):
        # The iteration runs in bf16: updates agree to its rounding.
        assert (a - b).norm() < 0.02 * (b - s).norm()


def test_orthogonalise_evens_out_the_singular_values() -> None:
    matrices = torch.randn(3, 12, 30, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices).float())
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_embeddings_and_norms_go_to_adamw() -> None:
    from softprompts.pretraining.model import build_model

    model = build_model(
        LMConfig(width=32, layers=2, heads=2, mlp_width=48, context=32), 300, LMTrainingConfig(device="cpu")
    )
    matrices, rest = build_optimizers(model, LMOptimizerConfig())
    assert isinstance(matrices, BatchedMuon)
    count = [sum(len(g["params"]) for g in o.param_groups) for o in (matrices, rest)]
    assert count == [2 * 7, 2 * 2 + 1 + 1]
    assert any(p.shape == (300, 32) for g in rest.param_groups for p in g["params"])


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_schedules_warm_up_and_never_jump(schedule: str) -> None:
    config = LMTrainingConfig(schedule=schedule, warmup_steps=10, decay_fraction=0.2)  # type: ignore[arg-type]
    factors = [rate_factor(config, step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == pytest.approx(1.0)
    assert max(abs(b - a) for a, b in itertools.pairwise(factors)) < 0.11
    assert factors[-1] == pytest.approx({"cosine": 0.1, "wsd": 0.0, "constant": 1.0}[schedule], abs=1e-9)


def test_wsd_follows_a_new_end() -> None:
    config = LMTrainingConfig(schedule="wsd", warmup_steps=10, decay_fraction=0.2)
    assert decay_start(config, 100) == 80
    assert [rate_factor(config, 79, 100), rate_factor(config, 80, 100), rate_factor(config, 90, 100)] == [1, 1, 0.5]
    # The same steps are still at the peak when the end moves out.
    assert rate_factor(config, 90, 200) == 1.0
