"""METEOR 1.5 (Denkowski & Lavie 2014): the authors' Java program, kept running, asked for statistics per segment.

The program's own corpus score is a function of the segments' summed statistics. That function is repeated here, so that
a bootstrap costs no second run and is exact.
"""

from __future__ import annotations

import atexit
import functools
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from typing import IO

import numpy as np

from softprompts.errors import DataError
from softprompts.evaluation.scorers.base import FloatArray, Metric, prepared, register
from softprompts.evaluation.scorers.bleu import webnlg_tokens
from softprompts.evaluation.scorers.caption import one_line, ptb_tokenized
from softprompts.evaluation.scorers.java import METEOR_JAR, command, missing_java

__all__ = ["meteor_process"]

_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_MODULE_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
"""English parameters of METEOR 1.5, task "rank": exact, stem, synonym, paraphrase."""

_STATISTICS = 23


class _MeteorProcess:
    """The running program; it loads its paraphrase table (60 MB) once, in the background."""

    def __init__(self) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the program runs
        self._lock = threading.Lock()
        arguments = command(METEOR_JAR, "Meteor", "-", "-", "-stdio", "-l", "en", "-norm")
        arguments.insert(1, "-Xmx2G")
        self._process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, encoding="utf-8"
        )
        atexit.register(self.close)

    def ask(self, lines: Sequence[str], answers: int | None = None) -> list[str]:
        """Send commands and return the answers: lines, as many as commands unless told (``EVAL`` gives more).

        Raises:
            DataError: The program ended.
        """
        with self._lock:
            # Another thread writes, because both pipes are short and the program answers line by line.
            writer = threading.Thread(target=self._write, args=(lines,))
            writer.start()
            assert self._process.stdout is not None
            expected = len(lines) if answers is None else answers
            found = [self._process.stdout.readline().strip() for _ in range(expected)]
            writer.join()
        if not all(found):
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip()
            raise DataError(f"METEOR ended early; its last words: {said[-300:] or 'none'}")
        return found

    def _write(self, lines: Sequence[str]) -> None:
        assert self._process.stdin is not None
        try:
            for line in lines:
                self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return  # reading finds out, and says why

    def close(self) -> None:
        """End the program."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


@functools.cache
def meteor_process() -> _MeteorProcess:
    """Return the running METEOR, started by the first call; it ends with this process.

    Raises:
        MissingExtraError: Java or the package ``pycocoevalcap`` is not there.
    """
    return _MeteorProcess()


def _clean(text: str) -> str:
    return one_line(text).replace("|||", "").replace("  ", " ")


def _statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
    """Per record: the program's 23 statistics against the best reference, as its own sum adds them up."""
    lines = [
        " ||| ".join(["SCORE", *map(_clean, texts), _clean(output)])
        for output, texts in zip(predictions, references, strict=True)
    ]
    rows_NS = np.array([[float(word) for word in answer.split()] for answer in meteor_process().ask(lines)])
    assert rows_NS.shape == (len(lines), _STATISTICS)
    length_N, reference_N, matches, chunks = rows_NS[:, 0], rows_NS[:, 1], rows_NS[:, 4:20], rows_NS[:, 20]
    perfect = (
        ((matches[:, 0::4] + matches[:, 2::4]).sum(axis=1) == length_N)
        & ((matches[:, 1::4] + matches[:, 3::4]).sum(axis=1) == reference_N)
        & (chunks == 1)
    )
    rows_NS[:, 20] = np.where(perfect, 0.0, chunks)  # a perfect segment is not fragmented
    return rows_NS


def _caption_statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> FloatArray:
    meteor_process()  # loads while the texts are tokenized
    return _statistics(*ptb_tokenized(predictions, references))


def _meteor(sums_RS: FloatArray) -> FloatArray:
    """``MeteorScorer.computeMetrics`` of METEOR 1.5 on summed statistics."""
    matches = sums_RS[:, 4:20].reshape(len(sums_RS), 4, 4)  # module x (content, content of reference, function, ...)
    weights = _MODULE_WEIGHTS[:, None] * np.array([_DELTA, 1 - _DELTA])
    hits = (matches[:, :, 0::2] * weights).sum(axis=(1, 2))
    reference_hits = (matches[:, :, 1::2] * weights).sum(axis=(1, 2))

    def weighted(length: FloatArray, function_words: FloatArray) -> FloatArray:
        return np.asarray(_DELTA * (length - function_words) + (1 - _DELTA) * function_words)

    with np.errstate(divide="ignore", invalid="ignore"):
        precision = hits / weighted(sums_RS[:, 0], sums_RS[:, 2])
        recall = reference_hits / weighted(sums_RS[:, 1], sums_RS[:, 3])
        f_mean = 1.0 / ((1 - _ALPHA) / precision + _ALPHA / recall)
        fragmentation = sums_RS[:, 20] / ((sums_RS[:, 21] + sums_RS[:, 22]) / 2)
        score = f_mean * (1 - _GAMMA * fragmentation**_BETA)
    return np.asarray(100.0 * np.maximum(np.nan_to_num(score, nan=0.0), 0.0))


def _register(name: str, description: str, statistics: object) -> None:
    assert callable(statistics)
    register(Metric(name, description, statistics, _meteor, missing=missing_java, start=meteor_process))


_register(
    "meteor",
    "METEOR 1.5 on texts tokenized as in coco-caption; equals METEOR of the official e2e-metrics",
    _caption_statistics,
)
_register("meteor_plain", "METEOR 1.5 on the texts as they are (-norm); DART's official METEOR", _statistics)
_register(
    "webnlg_meteor",
    "METEOR 1.5 (-norm) behind the tokenization of WebNLG 2017's scripts",
    prepared(_statistics, webnlg_tokens),
)
