"""Bodies of requests: the fields of OpenAI's API that mean something here, and a few of vLLM's.

A field that would change the answer and is not supported is refused, never ignored. Unknown fields are refused too, so
that a typing mistake is not silently a default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from softprompts.inference import SamplingOptions

__all__ = [
    "ChatMessage",
    "ChatRequest",
    "CompletionRequest",
    "LoadRequest",
    "ResponseFormat",
    "StreamOptions",
    "TextPart",
    "TextRequest",
    "UnloadRequest",
]

_Id = Annotated[int, Field(ge=0, lt=1 << 31)]
_Stop = Annotated[str, Field(min_length=1, max_length=500)]
_Name = Annotated[str, Field(min_length=1, max_length=300)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(_Body):
    """How a stream is written."""

    include_usage: bool = False
    """Whether its last chunk counts the tokens."""


class ResponseFormat(_Body):
    """Only plain text."""

    type: Literal["text"] = "text"


class TextRequest(_Body):
    """What both kinds of requests for text have in common."""

    model: _Name
    """A prompt, an ensemble or the bare model, as ``/v1/models`` lists them; also ``base:prompt``."""
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    """0 takes the best token; left out, 1."""
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=128)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Annotated[dict[_Id, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    presence_penalty: float | None = None
    """Only 0."""
    frequency_penalty: float | None = None
    """Only 0."""
    user: str | None = None
    """Taken and not used; as are ``metadata`` and ``store``."""
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    top_k: int | None = Field(None, ge=-1)
    """Draw among so many best tokens; 0 or -1 for all (vLLM)."""
    min_tokens: int | None = Field(None, ge=0)
    """No end before so many (vLLM)."""
    stop_token_ids: Annotated[list[_Id], Field(max_length=64)] | None = None
    """Tokens that end the output (vLLM)."""

    @model_validator(mode="after")
    def _refuse_what_is_not_done(self) -> Self:
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(self, name):
                raise ValueError(f"{name} other than 0 is not supported")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for stream=true")
        if self.store:
            raise ValueError("nothing is stored here; leave store out")
        return self

    @property
    def outputs(self) -> int:
        """N outputs per input."""
        return self.n or 1

    def options(self, max_tokens: int, logprobs: int | None) -> SamplingOptions:
        """What the engine is asked.

        Args:
            max_tokens: What was asked for, or what the server chose.
            logprobs: How many beside that of the token; ``None`` for none at all.
        """
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingOptions(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(0, self.top_k or 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=None if self.seed is None else self.seed % (1 << 63),
            n=self.outputs,
            stop=stop,
            stop_ids=tuple(self.stop_token_ids or ()),
            logprobs=logprobs,
            logit_bias=self.logit_bias or {},
        )


class CompletionRequest(TextRequest):
    """Body of ``/v1/completions``."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=1024)]
        | Annotated[list[_Id], Field(min_length=1)]
        | Annotated[list[Annotated[list[_Id], Field(min_length=1)]], Field(min_length=1, max_length=1024)]
    )
    """A text or several, or the ids of their tokens; ids are taken as they stand."""
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    """Only false."""
    best_of: int | None = None
    """Only 1 or ``n``."""
    suffix: str | None = None
    """Only empty."""

    @model_validator(mode="after")
    def _refuse_more(self) -> Self:
        if self.echo:
            raise ValueError("echo is not supported")
        if self.suffix:
            raise ValueError("suffix is not supported")
        if self.best_of not in (None, 1, self.outputs):
            raise ValueError("best_of other than n is not supported")
        return self

    @property
    def inputs(self) -> list[str | tuple[int, ...]]:
        """One per input."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [tuple(self.prompt)]
        return [one if isinstance(one, str) else tuple(one) for one in self.prompt]


class TextPart(_Body):
    """Part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=256)]
    name: str | None = Field(None, max_length=200)
    """Taken and not used."""

    @property
    def text(self) -> str:
        """All of it."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(TextRequest):
    """Body of ``/v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]
    max_completion_tokens: int | None = Field(None, ge=1)
    """The newer name of ``max_tokens``."""
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    """Only empty."""
    tool_choice: Literal["none", "auto"] | None = None

    @model_validator(mode="after")
    def _refuse_more(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def most_tokens(self) -> int | None:
        """Under either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class LoadRequest(_Body):
    """Body of ``/v1/load_prompt``."""

    name: _Name
    """Of a prompt in the server's folder: ``name`` or ``task/name``."""
    pin: bool = False
    """Whether it stays in memory until it is unloaded."""


class UnloadRequest(_Body):
    """Body of ``/v1/unload_prompt``."""

    name: _Name
