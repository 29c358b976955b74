"""Files of others: read without running anything in them, or refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softprompts.errors import ArtifactError, PromptMismatchError
from softprompts.storage.published import import_published, is_published
from softprompts.tasks import data_root

TABLE = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "held",
    [TABLE, torch.nn.Parameter(TABLE), {"soft_embeds": TABLE, "step": 3}, TABLE.double(), TABLE.T.contiguous().T],
    ids=["tensor", "parameter", "mapping", "float64", "strides"],
)
def test_a_torch_file_with_one_table_is_a_prompt(held: Any, tmp_path: Path, model: Any):
    torch.save(held, tmp_path / "p.pt")
    prompt = import_published(tmp_path / "p.pt")
    assert prompt.kind == "embedding"
    assert prompt.geometry.is_partial
    assert torch.equal(prompt.table_PW, TABLE)
    assert import_published(tmp_path / "p.pt", model).geometry == model.geometry


def test_numpy_files_are_read_as_ever(tmp_path: Path):
    np.save(tmp_path / "p.npy", TABLE.numpy())
    assert torch.equal(import_published(tmp_path / "p.npy").table_PW, TABLE)
    assert is_published("a.npy")
    assert is_published(Path("a.pt"))
    assert not is_published("folder")


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"a": TABLE, "b": TABLE}, "with 2 tensors"),
        ([TABLE], "a list with 0 tensors"),
        (TABLE[0], r"float32 \[12\]"),
        (TABLE.long(), "int64"),
        (TABLE.to_sparse(), "sparse"),
        (TABLE / 0, "not finite"),
    ],
    ids=["two", "list", "vector", "integers", "sparse", "infinite"],
)
def test_anything_else_is_refused(held: Any, said: str, tmp_path: Path):
    torch.save(held, tmp_path / "p.pt")
    with pytest.raises(ArtifactError, match=said):
        import_published(tmp_path / "p.pt")


def test_code_in_a_torch_file_does_not_run(tmp_path: Path):
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"soft_embeds": TABLE, "other": Bomb()}, tmp_path / "p.pt")
    with pytest.raises(ArtifactError, match="is refused"):
        import_published(tmp_path / "p.pt")
    assert not (tmp_path / "exploded").exists()


def test_damage_and_other_suffixes_are_refused(tmp_path: Path, model: Any):
    torch.save(TABLE, tmp_path / "p.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "p.pt").read_bytes()[:100])
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("cut.pt", "empty.pt", "missing.pt", "p.bin"):
        with pytest.raises(ArtifactError):
            import_published(tmp_path / name)
    torch.save(TABLE[:, :6].clone(), tmp_path / "narrow.pt")
    with pytest.raises(PromptMismatchError, match="width 6"):
        import_published(tmp_path / "narrow.pt", model)


@pytest.mark.data
@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("google_t5_1_1_lm100k_base/sst2.npy", (100, 768)),
        ("google_t5_1_1_lm100k_base/mrpc.npy", (100, 768)),
        ("google_t5_1_1_lm100k_base/rte.npy", (100, 768)),
        ("transferability/IMDBPromptT5Small.pt", (100, 512)),
        ("transferability/laptopPromptT5Small.pt", (100, 512)),
        ("transferability/MRPCPromptT5Small.pt", (100, 512)),
    ],
)
def test_published_prompts_are_read(path: str, shape: tuple[int, int]):
    file = (data_root() or Path()) / "trained_prompts" / path
    if not file.is_file():
        pytest.skip(f"{path} is not there: set SOFTPROMPTS_DATA")
    prompt = import_published(file)
    assert tuple(prompt.table_PW.shape) == shape
    assert float(prompt.table_PW.std()) > 0
