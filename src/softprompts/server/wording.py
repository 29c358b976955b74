"""What answers look like: OpenAI's objects for whole answers and for the chunks of a stream."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from softprompts.inference import Event, Output, TokenLogprobs

__all__ = ["ChatWording", "CompletionWording", "TokenText", "Wording", "sse", "usage_of"]

TokenText = Callable[[int], str]
"""What one token looks like."""


def sse(content: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def usage_of(input_tokens: int, output_tokens: int) -> dict[str, int]:
    """OpenAI's count; positions of a prompt are not tokens of anybody's input and do not count."""
    return {
        "prompt_tokens": input_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": input_tokens + output_tokens,
    }


class Wording:
    """The common part of both kinds.

    Args:
        head: ``id``, ``created`` and ``model`` of the answer.
        token_text: For log-probabilities.
        top: Whether log-probabilities were asked for.
    """

    whole_object = chunk_object = ""

    def __init__(self, head: dict[str, Any], token_text: TokenText, *, logprobs: bool) -> None:
        self._head, self._token_text, self._logprobs = head, token_text, logprobs
        self._offsets: dict[int, int] = {}

    def whole(self, outputs: Sequence[Output], usage: dict[str, int]) -> dict[str, Any]:
        """The answer to a request without streaming."""
        choices = [self._choice(index, output) for index, output in enumerate(outputs)]
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": usage}

    def opening(self, count: int) -> list[dict[str, Any]]:
        """Chunks in front of all text."""
        return []

    def chunk(self, choice: int, event: Event) -> dict[str, Any] | None:
        """What one event brings to a stream; ``None`` for nothing."""
        logprobs = event.logprobs[: len(event.ids)]
        if not (event.text or logprobs or event.finish_reason):
            return None
        return self._chunk([self._piece(choice, event)])

    def count(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last chunk, where it was asked for."""
        return {**self._chunk([]), "usage": usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_object, "choices": choices}

    def _choice(self, index: int, output: Output) -> dict[str, Any]:
        raise NotImplementedError

    def _piece(self, index: int, event: Event) -> dict[str, Any]:
        raise NotImplementedError


class CompletionWording(Wording):
    """``/v1/completions``."""

    whole_object = chunk_object = "text_completion"

    def _choice(self, index: int, output: Output) -> dict[str, Any]:
        return self._one(
            index, output.text, output.logprobs[: len(output.ids)], output.finish_reason, output.stop_reason
        )

    def _piece(self, index: int, event: Event) -> dict[str, Any]:
        logprobs = event.logprobs[: len(event.ids)]
        return self._one(index, event.text, logprobs, event.finish_reason, event.stop_reason)

    def _one(
        self,
        index: int,
        text: str,
        logprobs: Sequence[TokenLogprobs],
        finish_reason: str | None,
        stop_reason: int | str | None,
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": self._table(index, logprobs) if self._logprobs else None,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }

    def _table(self, index: int, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        tokens = [self._token_text(one.id) for one in logprobs]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(token)
        top = [{self._token_text(token): value for token, value in one.top} for one in logprobs]
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in logprobs],
            "top_logprobs": top if any(top) else None,
            "text_offset": offsets,
        }


class ChatWording(Wording):
    """``/v1/chat/completions``."""

    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"

    def opening(self, count: int) -> list[dict[str, Any]]:
        """Who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
            for index in range(count)
        ]

    def _choice(self, index: int, output: Output) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": output.text},
            "logprobs": self._list(output.logprobs[: len(output.ids)]) if self._logprobs else None,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }

    def _piece(self, index: int, event: Event) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"content": event.text} if event.text else {},
            "logprobs": self._list(event.logprobs[: len(event.ids)]) if self._logprobs else None,
            "finish_reason": event.finish_reason,
            "stop_reason": event.stop_reason,
        }

    def _list(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        return {
            "content": [
                {**self._token(one.id, one.logprob), "top_logprobs": [self._token(*item) for item in one.top]}
                for one in logprobs
            ]
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}
