"""Files of JSON, and the files of tensors whose size and digest stand in them: read without believing either.

Every kind of directory that this package writes is read through here: prompts, tuned weights, projectors.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from softprompts.errors import ArtifactError
from softprompts.storage.directory import read_file, read_head

__all__ = ["parse_tensors", "read_object", "read_recorded", "read_recorded_tensors"]

_MAX_BYTES = 1 << 40
"""Of a file whose size nobody wrote down."""


def read_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ArtifactError: It is missing, larger than ``max_bytes``, no JSON in UTF-8, or no object.
    """
    content = read_file(path, max_bytes)
    try:
        mapping = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"'{path}' is no valid JSON: {error}") from error
    if not isinstance(mapping, dict):
        raise ArtifactError(f"'{path}' holds a {type(mapping).__name__}, expected an object")
    return mapping


def read_recorded(path: Path, *, sha256: str, manifest: str, size_bytes: int | None = None) -> bytes:
    """Read the file that a manifest describes.

    Args:
        path: The file.
        sha256: What the manifest says that the digest is.
        manifest: Name of the manifest, for messages.
        size_bytes: What it says that the size is; a larger file is refused unread. ``None`` where it says nothing.

    Raises:
        ArtifactError: The file is missing, no regular file, of another size or with another digest.
    """
    content = read_file(path, _MAX_BYTES if size_bytes is None else size_bytes)
    if size_bytes is not None and len(content) < size_bytes:
        raise ArtifactError(
            f"'{path}' is truncated: {len(content)} bytes, expected {size_bytes}; copy it again, or make it again"
        )
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ArtifactError(
            f"'{path}' does not match the sha256 in {manifest}; it was damaged, so copy it again, or make it again"
        )
    return content


def read_recorded_tensors(
    path: Path, *, sha256: str, manifest: str, size_bytes: int | None = None
) -> dict[str, Tensor]:
    """Read the tensors that a manifest describes; see :func:`read_recorded`.

    Raises:
        ArtifactError: As there; or it is a pickle, which is never loaded, or no safetensors file.
    """
    _refuse_pickle(path, read_head(path, 9))
    return parse_tensors(path, read_recorded(path, sha256=sha256, manifest=manifest, size_bytes=size_bytes))


def parse_tensors(path: Path, content: bytes) -> dict[str, Tensor]:
    """Make tensors of what a safetensors file holds; ``path`` is for the message.

    Raises:
        ArtifactError: It is no safetensors file.
    """
    try:
        return load(content)
    except SafetensorError as error:
        raise ArtifactError(f"'{path}' is no safetensors file: {error}") from error


def _refuse_pickle(path: Path, head: bytes) -> None:
    # A safetensors header of 640 bytes also starts with 0x80 0x02: only the zeros and the brace after it tell.
    pickled = head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and head[8:9] != b"{"
    if pickled or head[:4] == b"PK\x03\x04":
        raise ArtifactError(
            f"'{path}' is a pickle (or torch.save archive) under another name; pickles are never loaded"
        )
