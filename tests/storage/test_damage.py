"""Whatever happens to the files, a prompt is loaded right or refused with an ArtifactError."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors

from softprompts.errors import ArtifactError
from softprompts.storage import PromptInfo, load_prompt, read_info
from softprompts.storage.manifest import TensorFile, parse_manifest, render_manifest

FUZZ = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FILES = ["prompt.json", "prompt.safetensors"]


def forge(directory: Path, content: bytes, change: Callable[[PromptInfo], PromptInfo] = lambda info: info) -> None:
    """Put other tensors into a prompt with all digests right, as a faulty or hostile writer would."""
    info = read_info(directory)
    (directory / "prompt.safetensors").write_bytes(content)
    tensors = TensorFile(hashlib.sha256(content).hexdigest(), len(content))
    (directory / "prompt.json").write_bytes(render_manifest(change(replace(info, tensors=tensors))))


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "prompt.safetensors")


@pytest.mark.parametrize("name", FILES)
@FUZZ
@given(data=st.data())
def test_a_flipped_bit_is_noticed(name: str, data: st.DataObject, saved: Path):
    path = saved / name
    whole = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    flipped = bytearray(whole)
    flipped[bit // 8] ^= 1 << (bit % 8)
    try:
        path.write_bytes(flipped)
        with pytest.raises(ArtifactError):
            load_prompt(saved)
    finally:
        path.write_bytes(whole)


def test_every_flipped_bit_of_the_manifest_is_noticed(saved: Path):
    whole = (saved / "prompt.json").read_bytes()
    assert parse_manifest(whole).length == 3
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(ArtifactError):
            parse_manifest(bytes(flipped))


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_noticed_wherever_it_ends(name: str, saved: Path):
    path = saved / name
    whole = path.read_bytes()
    for length in sorted({*range(16), *range(0, len(whole), 11), *range(len(whole) - 8, len(whole))}):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError):
            load_prompt(saved)


@pytest.mark.parametrize("name", FILES)
@FUZZ
@given(content=st.binary(max_size=200))
def test_any_other_bytes_are_refused(name: str, content: bytes, saved: Path):
    path = saved / name
    whole = path.read_bytes()
    try:
        for changed in (content, whole + content + b"\0", content + b"\0" + whole):
            path.write_bytes(changed)
            with pytest.raises(ArtifactError):
                load_prompt(saved)
    finally:
        path.write_bytes(whole)


@FUZZ
@given(content=st.binary(max_size=300), keep=st.integers(0, 200))
def test_a_malformed_tensor_file_with_right_digests_is_refused(content: bytes, keep: int, saved: Path):
    before = {name: (saved / name).read_bytes() for name in FILES}
    try:
        forge(saved, before["prompt.safetensors"][:keep] + content + b"\0")
        with pytest.raises(ArtifactError):
            load_prompt(saved)
    finally:
        for name, whole in before.items():
            (saved / name).write_bytes(whole)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name: str, saved: Path):
    (saved / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        load_prompt(saved)


def test_the_card_is_for_people_and_may_be_edited(saved: Path, model):
    (saved / "README.md").unlink()
    assert load_prompt(saved, model).info.length == 3


def test_windows_line_ends_are_no_damage(saved: Path, model):
    path = saved / "prompt.json"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_prompt(saved, model).info.length == 3


class Bomb:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_under_another_name_is_said_to_be_one(protocol: int, saved: Path, tmp_path: Path):
    (saved / "prompt.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "trace"), protocol=protocol) + b"." * 5000)
    with pytest.raises(ArtifactError, match="pickles are never loaded"):
        load_prompt(saved)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_with_right_digests_is_never_loaded(protocol: int, saved: Path, tmp_path: Path):
    forge(saved, pickle.dumps(Bomb(tmp_path / "trace"), protocol=protocol))
    with pytest.raises(ArtifactError):
        load_prompt(saved)
    assert not (tmp_path / "trace").exists()


def test_a_torch_archive_under_another_name_is_said_to_be_one(saved: Path):
    torch.save({"embeddings": torch.zeros(3, 12)}, saved / "prompt.safetensors")
    with pytest.raises(ArtifactError, match="pickles are never loaded"):
        load_prompt(saved)


@pytest.mark.parametrize("name", ["prompt.bin", "prompt.pt", "model.pkl"])
def test_a_directory_with_nothing_but_a_pickle_is_refused(name: str, tmp_path: Path):
    torch.save({}, tmp_path / name)
    with pytest.raises(ArtifactError, match=f"'{name}'.*never loaded"):
        load_prompt(tmp_path)


def test_a_peft_adapter_is_recognized(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ArtifactError, match="PEFT adapter"):
        load_prompt(tmp_path)


def test_a_header_of_640_bytes_is_no_pickle(saved: Path, model):
    """0x80 0x02 is how a pickle begins, and the length of this header in little endian."""
    content = (saved / "prompt.safetensors").read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    assert size < 640
    forge(saved, struct.pack("<Q", 640) + content[8 : 8 + size].ljust(640) + content[8 + size :])
    assert (saved / "prompt.safetensors").read_bytes()[:2] == b"\x80\x02"
    assert load_prompt(saved, model).info.length == 3


def test_a_tensor_that_does_not_belong_here_is_refused(saved: Path):
    forge(saved, save_tensors({**tensors_of(saved), "extra": torch.zeros(1)}))
    with pytest.raises(ArtifactError, match="unknown tensor 'extra'"):
        load_prompt(saved)


def test_a_tensor_that_is_missing_is_named(saved: Path):
    tensors = tensors_of(saved)
    name = min(tensors)
    tensors["other"] = tensors.pop(name)
    forge(saved, save_tensors(tensors))
    with pytest.raises(ArtifactError, match=f"lacks tensor '{name}'"):
        load_prompt(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float, saved: Path):
    tensors = tensors_of(saved)
    tensors[max(tensors)].view(-1)[-1] = value
    forge(saved, save_tensors(tensors))
    with pytest.raises(ArtifactError, match=f"'{max(tensors)}'.*not finite"):
        load_prompt(saved)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda t: t.double(),
        lambda t: t.half(),
        lambda t: t[..., :-1].contiguous(),
        lambda t: t[None],
        lambda t: t.int(),
    ],
)
def test_a_tensor_of_another_shape_or_dtype_is_refused(wrong: Callable[[torch.Tensor], torch.Tensor], saved: Path):
    tensors = tensors_of(saved)
    tensors[max(tensors)] = wrong(tensors[max(tensors)])
    forge(saved, save_tensors(tensors))
    with pytest.raises(ArtifactError, match=rf"'{max(tensors)}'.*expected float32 \["):
        load_prompt(saved)


def test_a_file_that_is_larger_than_announced_is_refused_unread(saved: Path):
    with (saved / "prompt.safetensors").open("r+b") as file:
        file.truncate(1 << 40)  # sparse: reading it would fill the memory
    with pytest.raises(ArtifactError, match="refused unread"):
        load_prompt(saved)


def test_a_manifest_that_is_too_large_is_refused_unread(saved: Path):
    with (saved / "prompt.json").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(ArtifactError, match="refused unread"):
        load_prompt(saved)


@pytest.mark.parametrize("name", FILES)
def test_a_symbolic_link_is_not_followed(name: str, saved: Path, tmp_path: Path):
    outside = tmp_path / "outside"
    (saved / name).rename(outside)
    (saved / name).symlink_to(outside)
    with pytest.raises(ArtifactError, match="symbolic link"):
        load_prompt(saved)


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_regular_file_is_refused(name: str, saved: Path):
    (saved / name).unlink()
    os.mkfifo(saved / name)
    with pytest.raises(ArtifactError, match="no regular file"):
        load_prompt(saved)
    (saved / name).unlink()
    (saved / name).mkdir()
    with pytest.raises(ArtifactError, match="no regular file"):
        load_prompt(saved)


def test_what_is_no_directory_of_a_prompt_is_said(tmp_path: Path, saved: Path):
    with pytest.raises(ArtifactError, match="does not exist"):
        load_prompt(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="is a file"):
        load_prompt(saved / "prompt.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="no saved prompt"):
        load_prompt(tmp_path / "empty")


def test_the_message_names_the_directory(saved: Path):
    manifest = json.loads((saved / "prompt.json").read_text(encoding="utf-8"))
    (saved / "prompt.json").write_text(json.dumps(manifest | {"task": "another"}), encoding="utf-8")
    with pytest.raises(ArtifactError, match=str(saved)):
        read_info(saved)
