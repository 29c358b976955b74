"""One writer per folder of results: two would resume, overwrite and delete each other's files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from softprompts.errors import StorageError

__all__ = ["LOCK_FILE", "alone_in"]

LOCK_FILE = ".lock"
"""Stays in the folder, empty; the operating system lets it go when its holder ends, however it ends."""


@contextlib.contextmanager
def alone_in(*directories: Path) -> Iterator[None]:
    """Keep every other process (and thread) out of folders of results, which are made if they are not there.

    Raises:
        StorageError: Another run writes to one, or it cannot be written.
    """
    with contextlib.ExitStack() as held:
        for directory in dict.fromkeys(directories):
            held.enter_context(_lock(directory))
        yield


def _lock(directory: Path) -> contextlib.AbstractContextManager[object]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return FileLock(directory / LOCK_FILE).acquire(blocking=False)
    except Timeout:
        raise StorageError(
            f"another run writes to '{directory}'; wait until it ends, stop it, or choose another folder"
        ) from None
    except OSError as error:
        raise StorageError(f"'{directory}' cannot be written: {error.strerror or error}") from error
