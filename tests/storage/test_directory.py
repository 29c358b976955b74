"""A directory is replaced whole or not at all, whatever happens to its writer."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompts.errors import ArtifactError, StorageError
from softprompts.storage import load_prompt, read_info, save_prompt
from softprompts.storage.directory import aside_path, write_directory

OLD = {"mark": b"old", "data": b"old data"}
NEW = {"mark": b"new", "data": b"new data"}


def write(directory: Path, files: dict[str, bytes], overwrite: bool = True) -> Path:
    return write_directory(directory, files, marker="mark", known=files, overwrite=overwrite)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class Killed(BaseException):
    """Stands for a signal: nothing but a bare ``except`` or ``finally`` sees it."""


def at_call(number: int, action: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``action`` happen in front of the n-th call of ``function`` (counted from 0)."""
    calls = iter(range(1000))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            action()
        return function(*args, **kwargs)

    return wrapped


def fail(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


def test_writes_and_replaces(tmp_path: Path):
    target = tmp_path / "a" / "b"
    assert write(target, OLD) == target
    assert content(target) == OLD
    write(target, NEW)
    assert content(target) == NEW
    assert names(target.parent) == ["b"]


def test_permissions_are_those_of_an_ordinary_directory(tmp_path: Path):
    write(tmp_path / "ours", OLD)
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_empty_directory_has_nothing_to_lose(tmp_path: Path):
    write(tmp_path, OLD, overwrite=False)
    assert content(tmp_path) == OLD


def test_a_link_to_a_directory_stays_a_link(tmp_path: Path):
    write(tmp_path / "real", OLD)
    (tmp_path / "latest").symlink_to("real")
    write(tmp_path / "latest", NEW)
    assert (tmp_path / "latest").is_symlink()
    assert content(tmp_path / "real") == NEW


@pytest.mark.parametrize("found", [{"notes.txt": b"mine"}, {"data": b"x"}, OLD | {"notes.txt": b"mine"}])
def test_what_is_not_ours_is_never_replaced(found: dict[str, bytes], tmp_path: Path):
    target = tmp_path / "t"
    target.mkdir()
    for name, data in found.items():
        (target / name).write_bytes(data)
    with pytest.raises(StorageError, match="not \\(only\\) a saved prompt"):
        write(target, NEW)
    assert content(target) == found
    assert names(tmp_path) == ["t"]


def test_a_file_is_never_replaced(tmp_path: Path):
    (tmp_path / "t").write_bytes(b"mine")
    with pytest.raises(StorageError, match="is a file"):
        write(tmp_path / "t", NEW)
    assert (tmp_path / "t").read_bytes() == b"mine"


@pytest.mark.parametrize("overwriting", [False, True])
@pytest.mark.parametrize("call", range(3))
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "I/O"), Killed()]
)
def test_a_write_that_fails_leaves_what_was_there(
    error: BaseException, call: int, overwriting: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    target = tmp_path / "t"
    if overwriting:
        write(target, OLD)
    monkeypatch.setattr(os, "fsync", at_call(call, fail(error), os.fsync))
    # The third flush is that of the directory's entries, which not every file system offers: no failure.
    harmless = call == 2 and isinstance(error, OSError)
    if harmless:
        write(target, NEW)
    else:
        with pytest.raises(Killed if isinstance(error, Killed) else StorageError) as caught:
            write(target, NEW)
        if isinstance(error, OSError):
            assert str(error.strerror) in str(caught.value)
            assert "untouched" in str(caught.value)
    assert names(tmp_path) == (["t"] if overwriting or harmless else [])
    assert not overwriting or content(target) == (NEW if harmless else OLD)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_really_refuses_to_grow(tmp_path: Path):
    """The operating system itself stops the write half way (EFBIG instead of ENOSPC, the same path)."""
    write(tmp_path / "t", OLD)
    with file_size_limit(1 << 20), pytest.raises(StorageError, match="could not be written"):
        write(tmp_path / "t", {"mark": b"new", "data": bytes(1 << 21)})
    assert content(tmp_path / "t") == OLD
    assert names(tmp_path) == ["t"]


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), Killed()])
@pytest.mark.parametrize("call", [0, 1])
def test_a_rename_that_fails_is_undone(
    error: BaseException, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(tmp_path / "t", OLD)
    monkeypatch.setattr(Path, "rename", at_call(call, fail(error), Path.rename))
    with pytest.raises((StorageError, Killed)):
        write(tmp_path / "t", NEW)
    assert content(tmp_path / "t") == OLD
    assert names(tmp_path) == ["t"]


@pytest.mark.parametrize("function", ["os.fsync", "pathlib.Path.rename", "shutil.rmtree"])
@pytest.mark.parametrize("call", range(4))
def test_a_writer_killed_anywhere_leaves_one_complete_prompt(
    function: str, call: int, tmp_path: Path, model, make_prompt, monkeypatch: pytest.MonkeyPatch
):
    """A child process dies without cleaning up; readers and the next writer cope with what it left."""
    target = tmp_path / "t"
    old, new = make_prompt("prefix"), make_prompt("prefix", seed=1)
    save_prompt(old, target, frozen=model)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # Python 3.12 warns of forks beside threads; the child uses none
        child = os.fork()
    if child == 0:
        owner = {"os.fsync": os, "pathlib.Path.rename": Path, "shutil.rmtree": shutil}[function]
        name = function.rsplit(".", 1)[1]
        setattr(owner, name, at_call(call, lambda: os._exit(9), getattr(owner, name)))
        save_prompt(new, target, frozen=model, overwrite=True)
        os._exit(0)
    os.waitpid(child, 0)
    table_PW = load_prompt(target, model).prompt.table_PW
    assert torch.equal(table_PW, old.table_PW) or torch.equal(table_PW, new.table_PW)
    # The next writer restores the name and clears what is old enough to be nobody's.
    for entry in tmp_path.glob(".t.*.writing"):
        os.utime(entry, (time.time() - 7200,) * 2)
    last = make_prompt("prefix", seed=2)
    save_prompt(last, target, frozen=model, overwrite=True)
    assert torch.equal(load_prompt(target, model).prompt.table_PW, last.table_PW)
    assert names(tmp_path) == ["t"]


def test_an_interrupted_replacement_is_not_taken_for_nothing(tmp_path: Path):
    """Without ``overwrite``, a prompt that waits aside is still in the way."""
    write(tmp_path / "t", OLD)
    (tmp_path / "t").rename(aside_path(tmp_path / "t"))
    with pytest.raises(StorageError, match="holds a prompt already"):
        write(tmp_path / "t", NEW, overwrite=False)
    assert content(tmp_path / "t") == OLD


def test_a_writer_at_work_is_left_alone(tmp_path: Path):
    (tmp_path / ".t.0123abcd.writing").mkdir()
    write(tmp_path / "t", OLD)
    assert names(tmp_path) == [".t.0123abcd.writing", "t"]


def test_a_reader_never_sees_a_half_replaced_prompt(tmp_path: Path, model, make_prompt):
    prompts = [make_prompt("prefix", length=2 + i, seed=i) for i in range(2)]
    save_prompt(prompts[0], tmp_path / "t", frozen=model)
    stop = threading.Event()

    def keep_writing() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            save_prompt(prompts[turn % 2], tmp_path / "t", frozen=model, overwrite=True)

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        for _ in range(80):
            loaded = load_prompt(tmp_path / "t", model).prompt
            assert torch.equal(loaded.table_PW, prompts[loaded.length - 2].table_PW)
            assert read_info(tmp_path / "t").length in (2, 3)
    finally:
        stop.set()
        writer.join()


def test_two_writers_leave_one_complete_prompt(tmp_path: Path, model, make_prompt):
    prompts = [make_prompt("prefix", length=2 + i, seed=i) for i in range(3)]
    unexpected: list[BaseException] = []

    def keep_writing(prompt: Any) -> None:
        for _ in range(15):
            try:
                save_prompt(prompt, tmp_path / "t", frozen=model, overwrite=True)
            except StorageError:
                pass  # the other one was in the way
            except BaseException as error:
                unexpected.append(error)

    writers = [threading.Thread(target=keep_writing, args=[prompt]) for prompt in prompts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert unexpected == []
    loaded = load_prompt(tmp_path / "t", model).prompt
    assert torch.equal(loaded.table_PW, prompts[loaded.length - 2].table_PW)


def test_an_unreadable_file_is_an_artifact_error(saved: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "fstat", at_call(0, fail(OSError(errno.EIO, "Input/output error")), os.fstat))
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_info(saved)
