"""What a verb leaves behind: one JSON object for programs, and a console for people that never gets in its way."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from softprompts.errors import StorageError

__all__ = ["JsonOption", "console_for", "write_json"]

JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the result as one JSON object to FILE ('-': standard output)."),
]
"""The option of every verb that measures: ``json: JsonOption = None``."""


def console_for(json_target: str | None = None) -> Console:
    """Return where a verb prints for people: standard output, or standard error where ``--json -`` needs the other."""
    return Console(stderr=json_target == "-", highlight=False)


def write_json(target: str | Path | None, content: Any) -> None:
    """Write one JSON object.

    Args:
        target: A file (folders on the way are made), ``-`` for standard output, ``None`` for nowhere.
        content: Mappings, lists and scalars; dataclasses, paths, sets and scalars of numpy and torch become plain
            ones. JSON knows no NaN and no infinity, so both become ``null``.

    Raises:
        StorageError: The file cannot be written.
    """
    if target is None:
        return
    text = json.dumps(_plain(content), ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    if str(target) == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    path = Path(target)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"the result cannot be written to '{path}': {error.strerror or error}; name another file after --json"
        ) from error


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch, which this module must not import
        return _plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no form in JSON: {value!r}")
