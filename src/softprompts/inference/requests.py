"""What is asked of the serving engine and what it answers: plain values, no tensors.

A request is token ids, the name of a prompt and options. The answer comes as events, one per output and step; whoever
wants whole outputs collects them (:class:`Output`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from softprompts.errors import ConfigError

__all__ = ["Event", "FinishReason", "Output", "Request", "SamplingOptions", "TokenLogprobs", "collect"]

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""``stop``: the end of text, a stop id or a stop string; ``length``: ``max_tokens`` or the model's context; ``error``:
the prompt could not be loaded, or the model gave no numbers (:attr:`Event.error` says why)."""


@dataclass(frozen=True)
class SamplingOptions:
    """How one request is continued."""

    max_tokens: int = 100
    """Most tokens per output, the end of text not counted."""
    min_tokens: int = 0
    """Until so many have come, neither the end of text nor a stop id nor a stop string ends the output."""
    temperature: float = 0.0
    """0 takes the best token; otherwise tokens are drawn."""
    top_k: int = 0
    """Draw among the k best tokens; 0 for all."""
    top_p: float = 1.0
    """Draw among the best tokens that together have this probability."""
    seed: int | None = None
    """Of the draws: the same seed gives the same output, whatever else runs. ``None`` draws one."""
    n: int = 1
    """Outputs."""
    stop: tuple[str, ...] = ()
    """Strings that end the output; it is cut in front of the first of them."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the output, beside the model's own end of text; they do not appear in it."""
    logprobs: int | None = None
    """Log-probabilities of every token and of so many best ones beside it, before temperature and bans; ``None`` for
    none at all."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    banned_ids: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that are never produced; the meaning is that of :func:`banned_sequences`."""
    forced_ids: tuple[int, ...] = ()
    """The first tokens of the output, whatever the model prefers: with ``logprobs``, how likely it finds them."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            ConfigError: A number is out of its range; the message names it.
        """
        limits: tuple[tuple[str, object, bool, str], ...] = (
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("min_tokens", self.min_tokens, 0 <= self.min_tokens <= self.max_tokens, "between 0 and max_tokens"),
            ("temperature", self.temperature, 0 <= self.temperature <= 100, "between 0 (the best token) and 100"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0 (0 keeps all tokens)"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1] (1 keeps all tokens)"),
            ("n", self.n, self.n >= 1, "at least 1"),
            ("logprobs", self.logprobs, self.logprobs is None or self.logprobs >= 0, "at least 0, or none"),
            ("stop", self.stop, all(self.stop), "strings that are not empty"),
            ("banned_ids", self.banned_ids, all(self.banned_ids), "sequences that are not empty"),
        )
        for name, value, fine, expected in limits:
            if not fine:
                raise ConfigError(f"{name} is {value}, expected {expected}")


@dataclass(frozen=True)
class Request:
    """One input to be continued."""

    id: str
    """Unique among the requests that are not finished."""
    ids: tuple[int, ...]
    """The input's tokens, all that the tokenizer puts around a text included; see :meth:`ServingEngine.encode`."""
    prompt: str | None = None
    """Name of the prompt in front of it; ``None`` for the bare model."""
    options: SamplingOptions = field(default_factory=SamplingOptions)
    averaged: tuple[str, ...] = ()
    """Names of prompts that write one output together, in place of ``prompt``: every token is chosen from the mean of
    their next-token distributions, and log-probabilities are those of the mean."""
    first: int = 0
    """Output i draws from sequence ``first + i`` of the seed's random numbers."""
    infix_at: int | None = None
    """Index of the first token behind the input, for prompts that stand there; a model runs these in closed batches."""
    at_once: bool = False
    """Whether the text of an output is told at its end: less work for every token, where nobody reads along."""

    @property
    def prompts(self) -> tuple[str | None, ...]:
        """One per row of an output."""
        return self.averaged or (self.prompt,)


@dataclass(frozen=True)
class TokenLogprobs:
    """One generated token with its log-probability."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The best tokens at this place, best first, with theirs."""


@dataclass(frozen=True)
class Event:
    """What one step brought to one output of a request."""

    request_id: str
    index: int
    """Number of the output, below ``n``."""
    text: str = ""
    """New text. Half a character, or what may become a stop string, is kept back until it is clear what it is."""
    ids: tuple[int, ...] = ()
    """New tokens; their text may come later. A token that ends the output is not among them."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per new token, where they were asked for; the token that ended the output has one, too."""
    finish_reason: FinishReason | None = None
    """Set in the last event of an output."""
    stop_reason: int | str | None = None
    """The stop string or stop id that ended it; ``None`` for the model's own end of text."""
    error: Exception | None = None
    """Why, where the reason is ``error``."""


@dataclass(frozen=True)
class Output:
    """One whole output: its events put together."""

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] = ()
    stop_reason: int | str | None = None
    error: Exception | None = None


def collect(events: Sequence[Event]) -> Output:
    """Put the events of one output together.

    Args:
        events: All of them, in order; the last one has a reason.
    """
    last = events[-1]
    assert last.finish_reason is not None, "the output is not finished"
    return Output(
        text="".join(event.text for event in events),
        ids=tuple(token for event in events for token in event.ids),
        finish_reason=last.finish_reason,
        logprobs=tuple(token for event in events for token in event.logprobs),
        stop_reason=last.stop_reason,
        error=last.error,
    )
