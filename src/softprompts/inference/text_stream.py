"""Text from tokens that come one by one: never half a character, never half of what may become a stop string.

A token of a byte-level vocabulary may end in the middle of a character, which decodes to U+FFFD until the rest has
come; and a decoder may write a token in another way at the start of a text than within it. So a few tokens are decoded
together, and only what can no longer change is handed out. All that was handed out, put together, is the text.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

__all__ = ["TextStream", "first_stop"]

_UNFINISHED = "\ufffd"
_LONGEST_WINDOW = 8
"""Tokens that are decoded together before the window is made smaller."""


def first_stop(text: str, stop: Sequence[str]) -> tuple[int, str] | None:
    """Find where a text ends: the first place at which a stop string begins, and which one.

    Of several that begin there it is the one that is named first; ``None`` where there is none.
    """
    found = [(place, one) for one in stop if (place := text.find(one)) >= 0]
    return min(found, key=lambda pair: pair[0]) if found else None


class TextStream:
    """The text of one output while it is being generated.

    Args:
        tokenizer: Decodes; special tokens leave no text.
        stop: Strings that end the text.
        at_once: Whether nothing is handed out before the end, where no stop string has to be looked for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), *, at_once: bool = False) -> None:
        self._tokenizer, self._stop, self._at_once = tokenizer, tuple(stop), at_once and not stop
        self._window: list[int] = []
        self._decoded = 0
        """Characters of the window's text that were taken from it."""
        self._since_stable = 0
        """Tokens of the window behind the last place where nothing was unfinished."""
        self._held = ""
        """Characters that may begin a stop string."""
        self.stopped_by: str | None = None
        """The stop string that was found; what came in front of it has been handed out."""

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """Take a token.

        Args:
            token: Its id.
            may_stop: Whether a stop string counts by now.

        Returns:
            What can be handed out.
        """
        self._window.append(token)
        if self._at_once:
            return ""
        self._since_stable += 1
        text = self._decode(self._window)
        stable = text.rstrip(_UNFINISHED)
        new, self._decoded = stable[self._decoded :], max(self._decoded, len(stable))
        if len(stable) == len(text):
            if (
                len(self._window) > _LONGEST_WINDOW
            ):  # what follows is decoded behind the tokens since the last such place
                self._window = self._window[-self._since_stable :]
                self._decoded = len(self._decode(self._window))
            self._since_stable = 0
        return self._released(new, may_stop)

    def finish(self, *, may_stop: bool = True) -> str:
        """Hand out the rest: the output ends here, and what is unfinished stays so."""
        text = self._released(self._decode(self._window)[self._decoded :], may_stop)
        if self.stopped_by is None:
            text, self._held = text + self._held, ""
        return text

    def _released(self, new: str, may_stop: bool) -> str:
        text, self._held = self._held + new, ""
        if not self._stop or not may_stop:
            return text
        found = first_stop(text, self._stop)
        if found is not None:
            place, self.stopped_by = found
            return text[:place]
        longest = max(map(len, self._stop)) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stop):
                self._held = text[start:]
                return text[:start]
        return text

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # a list of lists would give a list of texts
        return text
