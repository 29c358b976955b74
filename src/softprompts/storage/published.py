"""Prompts as others published them: plain arrays and torch files that hold one table ``[P, D]`` and nothing else.

They are read, never written (but for ``.npy``, see :mod:`softprompts.storage.npy`). A torch file is a pickle; it is
read by the restricted reader of torch (``weights_only``), which makes tensors and runs nothing, and refused if it
holds anything else.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softprompts.errors import ArtifactError
from softprompts.prompts import SoftPrompt
from softprompts.storage.directory import read_file
from softprompts.storage.manifest import MAX_TENSOR_BYTES
from softprompts.storage.match import IdentifiedModel
from softprompts.storage.npy import import_npy, is_npy, prompt_from_array

__all__ = ["import_published", "is_published"]

_TORCH_SUFFIXES = (".pt", ".pth")


def is_published(path: str | Path) -> bool:
    """Whether a path names a file of one of these forms, by its suffix."""
    return is_npy(path) or Path(path).suffix in _TORCH_SUFFIXES


def import_published(path: str | Path, frozen: IdentifiedModel | None = None) -> SoftPrompt:
    """Read an embedding prompt from a ``.npy``, ``.pt`` or ``.pth`` file.

    Args:
        path: The file. A torch file holds one floating-point tensor ``[P, D]``, or a mapping with one such tensor.
        frozen: The model that it was made for, which nothing can check but its width; ``None``: not known.

    Raises:
        ArtifactError: The file is missing, damaged, or holds anything else; nothing in it is executed.
        PromptMismatchError: The model has another width.
    """
    path = Path(path)
    if is_npy(path):
        return import_npy(path, frozen)
    if path.suffix not in _TORCH_SUFFIXES:
        raise ArtifactError(f"'{path}' is no file of a published prompt, expected one that ends in .npy, .pt or .pth")
    content = read_file(path.resolve(), MAX_TENSOR_BYTES)
    try:
        held: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file fails anywhere in the reader
        raise ArtifactError(
            f"'{path}' is no torch file of plain tensors, and is refused: {_first_line(error)}"
        ) from error
    tables = [held] if isinstance(held, Tensor) else _tensors_of(held)
    if len(tables) != 1:
        raise ArtifactError(
            f"'{path}' holds a {type(held).__name__} with {len(tables)} tensors, expected one tensor [P, D]"
        )
    table = tables[0].detach()
    if table.layout != torch.strided or table.is_quantized or not table.is_floating_point():
        raise ArtifactError(f"'{path}' holds a tensor of {table.dtype}, {table.layout}, expected plain numbers [P, D]")
    return prompt_from_array(path, table.to(torch.float32).numpy(), frozen)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _tensors_of(held: Any) -> list[Tensor]:
    return [value for value in held.values() if isinstance(value, Tensor)] if isinstance(held, Mapping) else []
