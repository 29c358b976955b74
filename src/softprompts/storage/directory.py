"""A directory of small files that is replaced whole or not at all, and read without following links.

Nothing here knows what a prompt is. A writer puts everything into a hidden sibling, flushes it to the disk, renames the
old directory aside, renames the new one in and deletes the old one. Whatever happens in between, one complete
directory is left: under its name, or beside it under :func:`aside_path`, where readers look for it and the next writer
restores it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypeVar

from softprompts.errors import ArtifactError, StorageError

__all__ = ["aside_path", "list_names", "read_file", "read_head", "read_stable", "replace_file", "write_directory"]

R = TypeVar("R")

_ATTEMPTS = 8
_STALE_AFTER_S = 3600.0
"""A hidden sibling older than this belongs to a writer that was killed; writing takes seconds."""


def aside_path(directory: Path) -> Path:
    """Where the old directory waits while a new one takes its name."""
    return directory.with_name(f".{directory.name}.replaced")


def read_stable(directory: str | Path, read: Callable[[Path], R]) -> R:
    """Read a directory that may be replaced meanwhile.

    Args:
        directory: Its name.
        read: Reads it at the path that it is given: where an interrupted writer left it, if it is not under its name.

    Raises:
        ArtifactError: ``read`` raised it and the directory was not replaced while it did.
    """
    target = Path(directory).resolve()
    aside = aside_path(target)
    for _ in range(_ATTEMPTS):
        seen = _identity(target), _identity(aside)
        try:
            return read(aside if seen[0] is None and seen[1] is not None else target)
        except ArtifactError:
            if seen == (_identity(target), _identity(aside)):
                raise
    return read(target)


def list_names(directory: Path) -> list[str]:
    """Return the sorted names of what is in a directory; raises ArtifactError where it cannot be listed."""
    try:
        return sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        raise ArtifactError(f"'{directory}' cannot be listed: {error.strerror or error}") from error


def _identity(directory: Path) -> tuple[int, int, int] | None:
    """What tells a directory from the one that replaced it; file systems reuse inodes at once, hence the time."""
    try:
        status = directory.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def read_file(path: Path, max_bytes: int) -> bytes:
    """Read one regular file.

    Args:
        path: The file. A symbolic link is refused: it could lead out of the directory.
        max_bytes: More than this is refused before anything is read.

    Raises:
        ArtifactError: The file is missing, no regular file, too large or unreadable.
    """
    return _read(path, max_bytes, None)


def read_head(path: Path, count: int) -> bytes:
    """Read the first ``count`` bytes of a regular file of any size; raises as :func:`read_file` does."""
    return _read(path, None, count)


def _read(path: Path, max_bytes: int | None, count: int | None) -> bytes:
    if path.is_symlink():
        raise ArtifactError(f"'{path}' is a symbolic link, expected a regular file; copy its target here instead")
    # O_NOFOLLOW: a link may have come since. O_NONBLOCK: opening a named pipe would wait for its writer for ever.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ArtifactError(f"'{path}' is no regular file; a prompt holds regular files only")
            if max_bytes is not None and status.st_size > max_bytes:
                raise ArtifactError(
                    f"'{path}' has {status.st_size} bytes, expected at most {max_bytes}; refused unread"
                )
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                return file.read(status.st_size if count is None else count)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise ArtifactError(f"'{path}' is missing; a prompt needs it, so save or copy the prompt again") from None
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read: {error.strerror or error}") from error


def write_directory(
    directory: str | Path, files: Mapping[str, bytes], *, marker: str, known: Collection[str], overwrite: bool
) -> Path:
    """Make ``directory`` hold exactly ``files``, atomically.

    Args:
        directory: Where; parents are made. An empty directory may be there already.
        files: Contents per plain file name.
        marker: The file that tells a directory of ours; without it nothing is overwritten.
        known: The names that a directory of ours may hold; with any other file in it, nothing is overwritten.
        overwrite: Whether a directory of ours may be replaced.

    Returns:
        The resolved path.

    Raises:
        StorageError: There is something that must not be replaced, or the disk refused (full, read-only, ...). What was
            there before is untouched and nothing of the attempt is left.
    """
    target = Path(directory).resolve()
    aside = aside_path(target)
    staging = target.with_name(f".{target.name}.{secrets.token_hex(4)}.writing")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        _restore(target, aside, marker)
        _check_replaceable(target, marker, known, overwrite)
        staging.mkdir()
        for name, content in files.items():
            _write_through(staging / name, content)
        _sync(staging)
        _swap(staging, target, aside, marker)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"'{target}' could not be written: {error.strerror or error}; what was there before is untouched"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def replace_file(path: str | Path, content: bytes) -> Path:
    """Make one file hold ``content``, atomically; its directory is made, what else lies there is left alone.

    Returns:
        The resolved path.

    Raises:
        StorageError: The disk refused. What was there before is untouched.
    """
    target = Path(path).resolve()
    staging = target.with_name(f".{target.name}.{secrets.token_hex(4)}.writing")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_through(staging, content)
        staging.replace(target)
        _sync(target.parent)
    except OSError as error:
        raise StorageError(
            f"'{target}' could not be written: {error.strerror or error}; what was there before is untouched"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            staging.unlink(missing_ok=True)
    return target


def _check_replaceable(target: Path, marker: str, known: Collection[str], overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise StorageError(f"'{target}' is a file, expected a directory or nothing; choose another path")
    names = {entry.name for entry in target.iterdir()}
    if not names:
        return
    foreign = sorted(names - set(known))
    if marker not in names or foreign:
        held = f"holds '{foreign[0]}'" if foreign else f"has no '{marker}'"
        raise StorageError(
            f"'{target}' is not (only) a saved prompt: it {held}; choose another path, or empty it first"
        )
    if not overwrite:
        raise StorageError(f"'{target}' holds a prompt already; choose another path or pass overwrite=True")


def _swap(staging: Path, target: Path, aside: Path, marker: str) -> None:
    try:
        if target.exists():
            target.rename(aside)
        staging.rename(target)
    except BaseException:  # an interrupt between the two renames counts as well
        _restore(target, aside, marker)
        raise
    _sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _restore(target: Path, aside: Path, marker: str) -> None:
    """Undo, or finish, what a killed writer left between its renames."""
    if not aside.is_dir():
        return
    if not target.exists():
        aside.rename(target)
    elif (target / marker).is_file():
        shutil.rmtree(aside)


def _remove_stale(target: Path) -> None:
    now = time.time()
    prefix, suffix = f".{target.name}.", ".writing"
    for entry in target.parent.iterdir():
        if entry.name.startswith(prefix) and entry.name.endswith(suffix):
            with contextlib.suppress(FileNotFoundError):  # its writer may be finishing just now
                if now - entry.stat().st_mtime > _STALE_AFTER_S:
                    shutil.rmtree(entry, ignore_errors=True)


def _write_through(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    """Flush a directory's entries. Some file systems (and Windows) cannot; then the rename alone has to do."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
