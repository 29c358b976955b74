"""Recipe values as sections and as dotted keys, and laid over others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["flat", "merged", "nested"]


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


def flat(sections: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Write sections as dotted keys, ``{"a": {"b": 1}}`` as ``{"a.b": 1}``; ``before`` stands in front of them."""
    keys: dict[str, Any] = {}
    for key, value in sections.items():
        keys |= flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return keys


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Write dotted keys as sections, ``{"a.b": 1}`` as ``{"a": {"b": 1}}``."""
    sections: dict[str, Any] = {}
    for key, value in values.items():
        *names, last = key.split(".")
        inside = sections
        for name in names:
            inside = inside.setdefault(name, {})
        inside[last] = value
    return sections
