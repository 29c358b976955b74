"""Recipe values laid over others, section by section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["merged"]


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay values over others; neither argument is changed.

    Args:
        below: Values that hold where ``above`` gives none.
        above: Values that win. Sections are merged key by key, lists are replaced. A section without a key, which YAML
            reads as nothing, changes nothing; any other value that is nothing wins like one that is something.

    Returns:
        Both together.
    """
    both = dict(below)
    for key, value in above.items():
        inner = both.get(key)
        if not isinstance(inner, Mapping) or not (value is None or isinstance(value, Mapping)):
            both[key] = value
        elif value is not None:
            both[key] = merged(inner, value)
    return both
