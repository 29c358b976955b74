"""The folder of this user where what can be built again lies: the family of language models, and token files.

``SOFTPROMPTS_CACHE`` names it; without that it is ``~/.cache/softprompts``. Below it lie ``models/NAME`` (Hugging Face
format), which ``family/NAME`` stands for wherever a model is named, and ``tokens/FINGERPRINT``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from softprompts.errors import ConfigError, DataNotFoundError

__all__ = ["FAMILY", "cache_folder", "find_member", "is_member", "member_folder"]

FAMILY = "family/"
"""What the name of a model of the family begins with."""
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_STAGE = re.compile(r"(.+)-(?:sc|(lm)\d+)")


def cache_folder() -> Path:
    """Return the folder; it need not exist."""
    named = os.environ.get("SOFTPROMPTS_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "softprompts"


def is_member(name_or_path: str | Path) -> bool:
    """Tell whether a model's name is one of the family's; a folder of that name on disk is what it says."""
    return str(name_or_path).startswith(FAMILY) and not Path(name_or_path).is_dir()


def member_folder(name: str) -> Path:
    """Return where a model of the family lies, or would.

    Args:
        name: With or without ``family/`` in front.

    Raises:
        ConfigError: It is no name: small letters, digits, ``-``, ``_`` and ``.`` only.
    """
    name = name.removeprefix(FAMILY)
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"'{name}' is no name for a model of the family; expected small letters, digits, '-', '_' and '.', "
            "for example dec-3m"
        )
    return cache_folder() / "models" / name


def find_member(name: str) -> Path:
    """Return the folder of a model of the family that has been built.

    Args:
        name: With or without ``family/`` in front.

    Raises:
        ConfigError: It is no name.
        DataNotFoundError: It has not been built here; the message says how.
    """
    folder = member_folder(name)
    if (folder / "config.json").is_file():
        return folder
    name = name.removeprefix(FAMILY)
    built = sorted(path.parent.name for path in folder.parent.glob("*/config.json"))
    raise DataNotFoundError(
        f"model 'family/{name}' is not in '{folder.parent}' (there: {', '.join(built) or 'none'}); build it with: "
        f"{_command(name)}; or set SOFTPROMPTS_CACHE to the folder whose models/{name} holds it"
    )


def _command(name: str) -> str:
    """The command that builds a member: its name says which recipe."""
    stage = _STAGE.fullmatch(name)
    recipe = (stage[1] if stage else name).replace("-", "_") + ("_adapt" if stage and stage[2] else "")
    return f"softprompts pretrain recipes/pretraining/family/{recipe}.yaml"
