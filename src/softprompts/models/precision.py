"""How a frozen model computes while prompts are trained: in which number type, compiled or not.

Weights, prompts, losses and everything outside of training keep their own type. Measured ratios are in
``docs/explanation/speed.md``.
"""

from __future__ import annotations

from typing import Literal

import torch

from softprompts.errors import ConfigError, nearest

__all__ = ["COMPILED_FROM_STEPS", "NARROWEST_FOR_BFLOAT16", "serving_dtype", "training_dtype", "worth_compiling"]

NARROWEST_FOR_BFLOAT16 = 256
"""Width D from which matrix products dominate a step, so that faster ones are worth the casts around them."""
COMPILED_FROM_STEPS = 2000
"""Updates after which the seconds that compiling takes have come back, on a CPU in float32."""

_CHOICES = ("auto", "float32", "bfloat16")


def training_dtype(precision: str, device: torch.device, width: int) -> torch.dtype | None:
    """Choose what matrix products are computed in while training.

    Args:
        precision: ``float32`` (the weights' own type), ``bfloat16``, or ``auto``: bfloat16 where it is faster, that is
            on CPUs with AVX512-BF16 or AMX and on GPUs that know it, for models of some width.
        device: Where the model is.
        width: D of the model.

    Returns:
        The type for autocast, or ``None`` for none.

    Raises:
        ConfigError: The precision is unknown.
    """
    if precision not in _CHOICES:
        raise ConfigError(f"unknown precision '{precision}': {nearest(precision, _CHOICES)}")
    if precision == "float32" or (precision == "auto" and width < NARROWEST_FOR_BFLOAT16):
        return None
    return torch.bfloat16 if precision == "bfloat16" or _computes_in_bfloat16(device) else None


def serving_dtype(device: torch.device) -> Literal["float32", "bfloat16"]:
    """What weights are best loaded as for answering requests: bfloat16 where the processor computes in it.

    Args:
        device: Where the model will be.
    """
    return "bfloat16" if _computes_in_bfloat16(device) else "float32"


def worth_compiling(device: torch.device, dtype: torch.dtype | None, steps: int) -> bool:
    """Whether compiling pays back within a run: it saves a fifth of a float32 step on a CPU, little of a bfloat16 one.

    Args:
        device: Where the model is.
        dtype: What :func:`training_dtype` returned.
        steps: Updates of the run.
    """
    return device.type == "cpu" and dtype is None and steps >= COMPILED_FROM_STEPS


def _computes_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
