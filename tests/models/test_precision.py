"""Which number type training computes in, and when it is compiled."""

from __future__ import annotations

import pytest
import torch

from softprompts.errors import ConfigError
from softprompts.models import precision
from softprompts.models.precision import COMPILED_FROM_STEPS, training_dtype, worth_compiling

CPU = torch.device("cpu")


@pytest.mark.parametrize("fast", [True, False])
def test_auto_takes_bfloat16_where_the_processor_knows_it(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(precision, "_computes_in_bfloat16", lambda device: fast)
    assert training_dtype("auto", CPU, 512) == (torch.bfloat16 if fast else None)
    assert training_dtype("auto", CPU, 32) is None  # too narrow to gain anything
    assert training_dtype("bfloat16", CPU, 32) == torch.bfloat16
    assert training_dtype("float32", CPU, 512) is None


def test_the_processor_is_asked() -> None:
    assert training_dtype("auto", CPU, 4096) in (None, torch.bfloat16)
    assert training_dtype("auto", torch.device("meta"), 4096) is None


def test_a_misspelt_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="bfloat16"):
        training_dtype("bfloat", CPU, 512)


def test_only_long_float32_runs_on_a_cpu_are_compiled() -> None:
    assert worth_compiling(CPU, None, COMPILED_FROM_STEPS)
    assert not worth_compiling(CPU, None, COMPILED_FROM_STEPS - 1)
    assert not worth_compiling(CPU, torch.bfloat16, 10 * COMPILED_FROM_STEPS)
    assert not worth_compiling(torch.device("cuda"), None, 10 * COMPILED_FROM_STEPS)
