"""Java programs that come with the package ``pycocoevalcap``: where they are, and what is missing to run them."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from softprompts.errors import MissingExtraError

__all__ = ["INSTALL", "METEOR_JAR", "TOKENIZER_JAR", "command", "missing_java", "missing_package"]

INSTALL = "pip install 'softprompts[metrics]'"
"""What brings the packages of the optional metrics."""

METEOR_JAR = "meteor/meteor-1.5.jar"
TOKENIZER_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
_PACKAGE = "pycocoevalcap"


def missing_package(name: str, install: str = INSTALL) -> str:
    """Say that a package is not installed; an empty text if it is."""
    return "" if importlib.util.find_spec(name) is not None else f"the package {name} is not installed ({install})"


def missing_java() -> str:
    """Say what a metric that runs on Java lacks; an empty text if nothing."""
    if missing := missing_package(_PACKAGE):
        return missing
    if shutil.which("java") is None:
        return "Java is not installed (any version from 8 on; Debian and Ubuntu: apt install default-jre-headless)"
    return ""


def command(jar: str, *arguments: str) -> list[str]:
    """Return the command line that runs a jar; ``arguments`` follow the class path.

    Raises:
        MissingExtraError: Java, the package or the jar is not there.
    """
    if missing := missing_java():
        raise MissingExtraError(missing)
    spec = importlib.util.find_spec(_PACKAGE)
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    path = next((Path(place) / jar for place in places if (Path(place) / jar).is_file()), None)
    if path is None:
        raise MissingExtraError(f"the package {_PACKAGE} lacks its file {jar}; install it again ({INSTALL})")
    program = shutil.which("java") or "java"
    # One collector thread: the programs are short or wait most of the time.
    return [program, "-XX:+UseSerialGC", "-Dfile.encoding=UTF-8", "-cp", str(path), *arguments]
