"""``events.jsonl``: one JSON object per update, validation and turn of a run.

Two runs are equal when their files are, apart from the fields in ``TIMING_FIELDS``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

from softprompts.errors import StorageError

__all__ = ["TIMING_FIELDS", "Event", "EventLog", "read_events"]

Event = Mapping[str, Any]
"""``{"event": "step" | "validation" | "not_learning" | "diverged" | "end", "step": int, ...}``."""

TIMING_FIELDS = ("seconds", "tokens_per_s")
"""Fields that differ from run to run; ``seconds`` is training time alone, validation and saving not counted."""


@final
class EventLog:
    """Append-only file of events; a resumed run cuts off what came after its checkpoint.

    Args:
        path: The file.
        keep_bytes: How much of an existing file stays.
        also: Called with every event after it is written (progress bar, TensorBoard).
    """

    def __init__(self, path: Path, *, keep_bytes: int = 0, also: Callable[[Event], None] | None = None) -> None:
        self._path = path
        self._also = also
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            if path.stat().st_size > keep_bytes:
                self._file.truncate(keep_bytes)
        except OSError as error:
            raise self._failed(error) from error

    def __enter__(self) -> EventLog:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # only what a failed write left behind, and that one was reported
            self._file.close()

    def write(self, event: str, step: int, **fields: Any) -> None:
        """Append one event and hand it on.

        Raises:
            StorageError: The disk is full or the file cannot be written.
        """
        entry = {"event": event, "step": step, **{name: _plain(value) for name, value in fields.items()}}
        try:
            self._file.write(json.dumps(entry, allow_nan=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from error
        if self._also is not None:
            self._also(entry)

    def sync(self) -> int:
        """Bring all events to the disk and return the size of the file in bytes."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            return os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(
            f"cannot write events to '{self._path}': {error}; the last checkpoint is intact: make room and resume"
        )


def _plain(value: Any) -> Any:
    """Turn numbers that JSON does not know (nan, inf) into ``None``, also inside of mappings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """Read an event file; a last line that was cut off by a kill is left out."""
    lines = Path(path).read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]
