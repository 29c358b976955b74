"""Optimizers and learning-rate schedules of pretraining."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers.models.t5.modeling_t5 import T5Attention

from softprompts.pretraining.recipe import LMOptimizerConfig, LMTrainingConfig

__all__ = ["BatchedMuon", "build_optimizers", "decay_start", "orthogonalise", "rate_factor"]

# Coefficients of the quintic iteration, chosen for slope at zero (Keller Jordan, https://kellerjordan.github.io/posts/muon/).
_QUINTIC = (3.4445, -4.7750, 2.0315)


class BatchedMuon(torch.optim.Optimizer):
    """Muon with decoupled weight decay; matrices of one shape are orthogonalised together.

    The same update as ``torch.optim.Muon(nesterov=True, adjust_lr_fn="original")`` up to rounding, but one batched
    product per shape instead of a hundred small ones, which on CPUs halves the time of a step.

    Args:
        params: Matrices ``[rows, columns]`` (no embeddings, no norms), or groups of them.
        lr: Learning rate of an orthogonal update, before the factor ``sqrt(max(1, rows / columns))``.
        momentum: Of the running mean of gradients.
        weight_decay: Decoupled, times ``lr``.
        steps: Newton-Schulz iterations.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all matrices that have a gradient."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._step_shape(group, parameters)

    def _step_shape(self, group: dict[str, Any], parameters: list[torch.nn.Parameter]) -> None:
        updates = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
            updates.append(parameter.grad.lerp(buffer, group["momentum"]))
        orthogonal = orthogonalise(torch.stack(updates), group["steps"])
        rows, columns = parameters[0].shape
        rate = group["lr"] * max(1.0, rows / columns) ** 0.5
        for parameter, update in zip(parameters, orthogonal, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update.to(parameter.dtype), alpha=-rate)


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Bring the singular values of ``[batch, rows, columns]`` close to one: quintic Newton-Schulz iteration in bf16."""
    a, b, c = _QUINTIC
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def build_optimizers(model: torch.nn.Module, config: LMOptimizerConfig) -> list[torch.optim.Optimizer]:
    """Give the matrices of the blocks one optimizer, and embeddings and norms another.

    T5 does not divide its attention scores by the root of the head size H; its queries start that much smaller instead
    and here learn that much slower, by a factor of ``H ** -0.5``, which gives the scores the pace of a Llama's.

    Each parameter group carries its peak rate as ``peak_lr``, which :func:`rate_factor` scales.
    """
    embedding = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in embedding]
    known = {id(p) for p in matrices}
    groups = _groups(model, matrices, config.matrix_learning_rate)
    others = [p for p in model.parameters() if id(p) not in known]
    rest = torch.optim.AdamW(others, lr=config.learning_rate, betas=config.betas, weight_decay=0.0)
    first: torch.optim.Optimizer
    if config.matrices == "muon":
        first = BatchedMuon(
            groups, lr=config.matrix_learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )
    else:
        first = torch.optim.AdamW(
            groups, lr=config.matrix_learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
    for optimizer in (first, rest):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [first, rest]


def _groups(model: torch.nn.Module, matrices: list[torch.nn.Parameter], rate: float) -> list[dict[str, Any]]:
    unscaled = {
        id(module.q.weight): module.key_value_proj_dim for module in model.modules() if isinstance(module, T5Attention)
    }
    queries = [p for p in matrices if id(p) in unscaled]
    groups: list[dict[str, Any]] = [{"params": [p for p in matrices if id(p) not in unscaled]}]
    if queries:
        groups.append({"params": queries, "lr": rate * unscaled[id(queries[0])] ** -0.5})
    return groups


def decay_start(config: LMTrainingConfig, total_steps: int) -> int:
    """First step at which a ``wsd`` schedule is below its peak (``total_steps`` for the others)."""
    if config.schedule != "wsd":
        return total_steps
    return total_steps - round(total_steps * config.decay_fraction)


def rate_factor(config: LMTrainingConfig, step: int, total_steps: int) -> float:
    """Share of the peak learning rate at a step: a pure function, so a resumed run may have a new end.

    Args:
        config: Names the schedule.
        step: The step about to be done, from 0.
        total_steps: Where the schedule ends.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        cosine = 0.5 * (1.0 + float(torch.cos(torch.tensor(min(1.0, done) * torch.pi, dtype=torch.float64))))
        return 0.1 + 0.9 * cosine
    start = decay_start(config, total_steps)
    if step < start:
        return 1.0
    return max(0.0, (total_steps - step) / max(1, total_steps - start))
