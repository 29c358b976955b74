"""Files of JSON and of tensors, whatever somebody made of them."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from softprompts.errors import ArtifactError
from softprompts.storage.recorded import read_object, read_recorded, read_recorded_tensors

CONTENT = save({"weight": torch.arange(6.0)}, metadata={"format": "pt"})


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    place = tmp_path / "weights.safetensors"
    place.write_bytes(CONTENT)
    return place


@pytest.mark.parametrize("size_bytes", [None, len(CONTENT)])
def test_what_the_manifest_says_is_read(path: Path, size_bytes: int | None):
    found = read_recorded_tensors(path, sha256=digest(CONTENT), manifest="some.json", size_bytes=size_bytes)
    assert torch.equal(found["weight"], torch.arange(6.0))
    assert read_recorded(path, sha256=digest(CONTENT), manifest="some.json", size_bytes=size_bytes) == CONTENT


@pytest.mark.parametrize(
    ("content", "size_bytes", "message"),
    [
        (CONTENT[:-1], len(CONTENT), "truncated"),
        (CONTENT[:-1], None, r"sha256 in some\.json"),
        (CONTENT[:-1] + b"!", len(CONTENT), r"sha256 in some\.json"),
        (CONTENT + b"!", len(CONTENT), "refused unread"),
        (CONTENT + b"!", None, r"sha256 in some\.json"),
        (b"", None, r"sha256 in some\.json"),
    ],
)
def test_anything_else_is_refused(path: Path, content: bytes, size_bytes: int | None, message: str):
    path.write_bytes(content)
    for read in (read_recorded, read_recorded_tensors):
        with pytest.raises(ArtifactError, match=message):
            read(path, sha256=digest(CONTENT), manifest="some.json", size_bytes=size_bytes)


def test_a_right_digest_makes_no_tensors_of_other_bytes(path: Path):
    for content, message in ((b"other", "no safetensors file"), (pickle.dumps([1]), "pickles are never loaded")):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=message):
            read_recorded_tensors(path, sha256=digest(content), manifest="some.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1", "no valid JSON"),
        (b"\xff{}", "no valid JSON"),
        (b"[" * 100_000, "no valid JSON"),
        (b"[1]", "holds a list, expected an object"),
        (b"null", "holds a NoneType, expected an object"),
        (b'{"a": "' + b"x" * 200_000 + b'"}', "refused unread"),
    ],
    ids=lambda value: str(value[:12]),
)
def test_only_an_object_is_one(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        read_object(path, 150_000)
    path.write_bytes(b'{"a": [1]}')
    assert read_object(path, 150_000) == {"a": [1]}
