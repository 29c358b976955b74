"""Ctrl-C and SIGTERM: the update at hand is finished first, so that what is saved is whole."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

__all__ = ["stop_signals"]


@contextmanager
def stop_signals() -> Iterator[Sequence[str]]:
    """Collect the names of Ctrl-C and SIGTERM signals.

    A second signal acts at once. Outside of the main thread nothing is changed (Python allows handlers only there).
    """
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, _frame: object) -> None:
        received.append("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)
        os.write(2, b"\nstopping after this step and saving; once more to stop at once\n")  # print is not reentrant
        for other in numbers:
            signal.signal(other, before[other])

    for number in numbers:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number in numbers:
            signal.signal(number, before[number])
