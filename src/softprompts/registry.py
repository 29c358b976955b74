"""Named things that a recipe can ask for: tasks, initializers, optimizers, metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from softprompts.errors import ConfigError, nearest

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """A table from names to objects that answers an unknown name with the nearest known one.

    Args:
        what: What an entry is, in the singular, for error messages (``"optimizer"``).
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that enters its argument under ``name``."""

        def enter(entry: T) -> T:
            assert name not in self._entries, f"{self.what} '{name}' is registered twice"
            self._entries[name] = entry
            return entry

        return enter

    def get(self, name: str) -> T:
        """Look ``name`` up.

        Raises:
            ConfigError: There is no such entry; the message names the nearest one.
        """
        if name not in self._entries:
            raise ConfigError(f"unknown {self.what} '{name}': {nearest(name, self._entries)}")
        return self._entries[name]

    def names(self) -> list[str]:
        """Return the known names, sorted."""
        return sorted(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self._entries
