"""The folder of prompts as the pool of a server sees it: names at once, everything else when it is asked for."""

from __future__ import annotations

import re

from softprompts.errors import ArtifactError
from softprompts.models import FrozenLM
from softprompts.storage import LoadedPrompt, PromptInfo
from softprompts.storage.artifact import MANIFEST_FILE
from softprompts.storage.library import PromptLibrary

__all__ = ["PromptFolder"]

_ASIDE = re.compile(r"\.(.+)\.replaced")
"""Where a prompt waits whose replacement was interrupted."""


class PromptFolder:
    """A library whose names are listed without reading what they name: 10,000 manifests take many seconds.

    A prompt that turns out to be damaged when it is asked for is that request's error.

    Args:
        library: The folder.
    """

    def __init__(self, library: PromptLibrary) -> None:
        self._library = library

    def names(self) -> list[str]:
        """Names of all directories with a manifest, ``name`` and ``task/name``, sorted."""
        root, found = self._library.root, set()
        for pattern in ("*", "*/*"):
            for path in root.glob(f"{pattern}/{MANIFEST_FILE}"):
                *task, own = path.parent.relative_to(root).parts
                aside = _ASIDE.fullmatch(own)
                name = "/".join([*task, aside[1] if aside else own])
                try:
                    self._library.path(name)
                except ArtifactError:
                    continue  # no name that a request may use, or a symbolic link
                found.add(name)
        return sorted(found)

    def info(self, name: str) -> PromptInfo:
        """As :meth:`PromptLibrary.info`."""
        return self._library.info(name)

    def load(self, name: str, frozen: FrozenLM) -> LoadedPrompt:
        """As :meth:`PromptLibrary.load`."""
        return self._library.load(name, frozen)
