"""Prompts as plain NumPy arrays ``[P, D]``, the form in which Google published those of the prompt-tuning paper.

Such a file holds embeddings for the input (of an encoder, where there is one) and nothing else: which model they are
for is not in it. Without a model at hand a prompt of :func:`import_npy` therefore knows no more of it than the width.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softprompts.errors import ArtifactError, PromptMismatchError, StorageError, UnsupportedModelError
from softprompts.prompts import SoftPrompt, prompt_from_table
from softprompts.storage.directory import read_file, replace_file
from softprompts.storage.manifest import MAX_TENSOR_BYTES
from softprompts.storage.match import IdentifiedModel, unknown_model

__all__ = ["export_npy", "import_npy", "is_npy", "prompt_from_array"]

_SUFFIX = ".npy"


def is_npy(path: str | Path) -> bool:
    """Whether a path names a NumPy file."""
    return Path(path).suffix == _SUFFIX


def import_npy(path: str | Path, frozen: IdentifiedModel | None = None) -> SoftPrompt:
    """Read a published prompt.

    Args:
        path: A ``.npy`` file with numbers ``[P, D]``. float32 and float16 are kept bit for bit, float64 is rounded.
        frozen: The model that it was made for, which nothing can check but its width; ``None``: not known.

    Returns:
        An embedding prompt; its geometry is that of ``frozen``, or knows the width alone.

    Raises:
        ArtifactError: The file is missing, damaged or no such array. Pickled objects are never loaded.
        PromptMismatchError: The model has another width.
    """
    path = Path(path)
    content = read_file(path.resolve(), MAX_TENSOR_BYTES)
    try:
        array: Any = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError) as error:
        raise ArtifactError(f"'{path}' is no plain NumPy array: {str(error).splitlines()[0]}") from error
    return prompt_from_array(path, array, frozen)


def prompt_from_array(path: Path, array: Any, frozen: IdentifiedModel | None = None) -> SoftPrompt:
    """Make an embedding prompt of what a published file holds.

    Args:
        path: The file, for messages.
        array: What was in it; floating-point numbers ``[P, D]`` are accepted.
        frozen: The model that it was made for; ``None``: not known.

    Raises:
        ArtifactError: It is no such array, or has values that are not finite.
        PromptMismatchError: The model has another width.
    """
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f" or 0 in array.shape:
        got = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive of arrays"
        raise ArtifactError(f"'{path}' holds {got}, expected floating-point numbers [P, D]: one vector per position")
    width = array.shape[1]
    if frozen is not None and frozen.geometry.width != width:
        raise PromptMismatchError(
            f"the vectors in '{path}' have width {width}, '{frozen.name}' has {frozen.geometry.width}; name the model "
            "that they were made for"
        )
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
        table_PD = torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
    if not bool(torch.isfinite(table_PD).all()):
        raise ArtifactError(f"'{path}' has values that are not finite numbers in float32; nothing was imported")
    return prompt_from_table("embedding", (frozen or unknown_model(width)).geometry, table_PD)


def export_npy(prompt: SoftPrompt, path: str | Path, *, dtype: str = "float32", overwrite: bool = False) -> Path:
    """Write an embedding prompt as a plain array; a file of :func:`import_npy` comes out bit for bit.

    Args:
        prompt: An embedding prompt.
        path: A name that ends in ``.npy``.
        dtype: ``float32`` or ``float16``; NumPy has no ``bfloat16``.
        overwrite: Replace a file that is there.

    Returns:
        The resolved path.

    Raises:
        UnsupportedModelError: The prompt is a prefix (an array has no names for layers, keys and values) or an infix.
        StorageError: The file must not be replaced, or the disk refused.
    """
    target = Path(path).resolve()
    if prompt.kind != "embedding":
        raise UnsupportedModelError(
            f"a {prompt.kind} prompt cannot become '{target.name}': a plain array has no place for layers, keys and "
            "values; only embedding prompts have this form"
        )
    if prompt.is_infix:
        raise UnsupportedModelError(
            f"an infix cannot become '{target.name}': a plain array does not say where its prompt stands, and would "
            "come back as a prompt in front of the text; keep it in the format of softprompts"
        )
    if not is_npy(target):
        raise StorageError(f"'{target}' does not end in {_SUFFIX}; choose such a name")
    if target.exists() and (not overwrite or not target.is_file()):
        raise StorageError(f"'{target}' is there already; choose another path or pass overwrite=True")
    buffer = io.BytesIO()
    np.save(buffer, prompt.table_PW.cpu().numpy().astype("<f2" if dtype == "float16" else "<f4"), allow_pickle=False)
    return replace_file(target, buffer.getvalue())
