"""Who may ask for what: API keys, the prompts that each may use, and how often.

A key is 32 random bytes, so its SHA-256 is kept and nothing slower: there is nothing to guess. The file of keys holds
hashes alone; whoever reads it cannot use it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import yaml

from softprompts.config import decode
from softprompts.errors import ConfigError, DataNotFoundError
from softprompts.server.failures import ApiError

__all__ = ["ANYBODY", "ApiKey", "KeyRing", "hash_key", "load_keys", "make_key"]

_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ApiKey:
    """One entry of the file of keys."""

    name: str
    """Whose it is; stands in logs."""
    sha256: str
    """Of the key, 64 hex digits; :func:`hash_key`."""
    prompts: tuple[str, ...] = ()
    """Names of prompts and ensembles that it may use; ``*`` stands for any characters: ``team-a/*``."""
    base_model: bool = True
    """Whether it may use the bare model."""
    admin: bool = False
    """Whether it may load and unload prompts, where the server allows that."""
    requests_per_minute: int | None = None
    """Most requests for text, in bursts of at most a minute's worth; ``None`` for any number."""
    max_concurrent: int | None = None
    """Most outputs that wait or run at once; ``None`` for any number."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            ConfigError: The name is empty, the hash is none, or a limit is below 1.
        """
        if not self.name:
            raise ConfigError("a key has no name; say whose it is")
        if not _HASH.fullmatch(self.sha256):
            raise ConfigError(
                f"key '{self.name}': sha256 is not 64 lower-case hex digits; `softprompts serve --make-key NAME` "
                "prints a key and its hash"
            )
        for name in ("requests_per_minute", "max_concurrent"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(
                    f"key '{self.name}': {name} is {value}, expected 1 or more; leave it out for no limit"
                )

    def may_use(self, name: str) -> bool:
        """Whether it may use, and know of, a prompt."""
        return any(fnmatchcase(name, pattern) for pattern in self.prompts)


ANYBODY = ApiKey("anybody", "0" * 64, prompts=("*",))
"""Who asks where the server has no keys."""


@dataclass(frozen=True)
class _KeyFile:
    keys: tuple[ApiKey, ...]


def make_key() -> str:
    """Draw a new key."""
    return f"sp-{secrets.token_urlsafe(32)}"


def hash_key(key: str) -> str:
    """SHA-256 of a key, as hex digits."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def load_keys(path: str | Path) -> KeyRing:
    """Read a YAML file with a list ``keys``, each with the fields of :class:`ApiKey`.

    Raises:
        DataNotFoundError: There is no such file.
        ConfigError: It is no such list, or a value makes no sense.
    """
    path = Path(path)
    if not path.is_file():
        raise DataNotFoundError(
            f"the file of keys '{path}' does not exist; `softprompts serve --make-key NAME` prints an entry for it"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file of keys '{path}' is no valid YAML in UTF-8") from error
    if not isinstance(content, dict):
        raise ConfigError(f"the file of keys '{path}' holds no mapping, expected a list below 'keys:'")
    try:
        return KeyRing(decode(_KeyFile, content).keys)
    except ConfigError as error:
        raise ConfigError(f"the file of keys '{path}': {error}") from error


@dataclass
class _Use:
    """What a key has used up."""

    tokens: float
    """Requests that it may make just now."""
    when: float
    outputs: int = 0


@dataclass
class KeyRing:
    """All keys of a server, and how much each is used."""

    keys: Iterable[ApiKey]
    clock: Callable[[], float] = time.monotonic
    _uses: dict[str, _Use] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse ambiguity.

        Raises:
            ConfigError: There are no keys, or two share a name or a hash.
        """
        self.keys = tuple(self.keys)
        for what in ("name", "sha256"):
            values = [getattr(key, what) for key in self.keys]
            if len(set(values)) < len(values):
                raise ConfigError(f"two keys have the same {what}; each needs its own")
        if not self.keys:
            raise ConfigError("there are no keys, so nobody could ask for anything; add one")

    def find(self, token: str) -> ApiKey | None:
        """Whose key this is. Takes equally long whoever it is and whatever of it is right."""
        digest = hash_key(token)
        found = None
        for key in self.keys:
            if hmac.compare_digest(digest, key.sha256):
                found = key
        return found

    def take(self, key: ApiKey, outputs: int) -> None:
        """Count a request for text; :meth:`give_back` must follow.

        Args:
            key: Whose.
            outputs: How many it asks for.

        Raises:
            ApiError: 429, with the time after which it may ask again; 422: it may never ask for so many.
        """
        if key.max_concurrent is not None and outputs > key.max_concurrent:
            raise ApiError(
                422,
                f"{outputs} outputs were asked for, this key may have {key.max_concurrent} at once",
                "invalid_value",
            )
        now = self.clock()
        per_minute = key.requests_per_minute
        use = self._uses.setdefault(key.name, _Use(float(per_minute or 0), now))
        if key.max_concurrent is not None and use.outputs + outputs > key.max_concurrent:
            raise ApiError(
                429,
                f"this key may have {key.max_concurrent} outputs at once and has {use.outputs}",
                "concurrency_limit_exceeded",
                retry_after_s=1,
            )
        if per_minute is not None:
            use.tokens = min(per_minute, use.tokens + (now - use.when) * per_minute / 60)
            use.when = now
            if use.tokens < 1:
                wait_s = (1 - use.tokens) * 60 / per_minute
                raise ApiError(
                    429, f"this key may ask {per_minute} times a minute", "rate_limit_exceeded", retry_after_s=wait_s
                )
            use.tokens -= 1
        use.outputs += outputs

    def give_back(self, key: ApiKey, outputs: int) -> None:
        """A request is done."""
        self._uses[key.name].outputs -= outputs
