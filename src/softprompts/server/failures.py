"""What a client is told when something is wrong: a status and OpenAI's error object."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from softprompts.errors import (
    ArtifactError,
    ConfigError,
    LengthError,
    PlacementError,
    PoolFullError,
    PromptMismatchError,
    QueueFullError,
    UnknownPromptError,
    UnsupportedModelError,
)

__all__ = ["STATUS_TYPES", "ApiError", "from_engine", "from_validation", "unknown_model"]

STATUS_TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Every status that a client may see beside 200, and the ``type`` of its error object."""


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: Of :data:`STATUS_TYPES`.
        message: For people; never names what this client may not know of.
        code: For programs.
        param: The field of the request that is wrong.
        retry_after_s: When asking again makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after_s = status, code, param, retry_after_s

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        error_type = STATUS_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": error_type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The HTTP answer."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def unknown_model(name: str) -> ApiError:
    """There is no such model, or this key may not know that there is one; the two look the same."""
    return ApiError(404, f"the model '{name[:200]}' does not exist", "model_not_found", param="model")


def from_engine(error: BaseException, model: str) -> ApiError:
    """Say what the engine or the pool of prompts raised.

    Args:
        error: What it raised.
        model: The name that the client asked for; messages of the pool may hold names that it may not see.
    """
    if isinstance(error, UnknownPromptError):
        return unknown_model(model)
    if isinstance(error, QueueFullError):
        return ApiError(429, "too many requests wait already; ask again later", "queue_full", retry_after_s=1)
    if isinstance(error, LengthError):
        return ApiError(413, str(error), "context_length_exceeded")
    if isinstance(error, PoolFullError):
        text = "this server has no memory left for another prompt; whoever runs it can give it more (--prompts-mib)"
        return ApiError(503, text, "prompt_memory_full")
    if isinstance(error, PlacementError):
        return ApiError(409, str(error), "prompt_unusable")
    if isinstance(error, (ArtifactError, PromptMismatchError, UnsupportedModelError)):
        return ApiError(409, f"the prompt '{model[:200]}' cannot be used with this model", "prompt_unusable")
    if isinstance(error, ConfigError):
        return ApiError(422, str(error), "invalid_value")
    return ApiError(500, "the server failed to answer this request", "internal_error")


def from_validation(error: ValidationError) -> ApiError:
    """Say what is wrong with a body: the first mistake, and how many more there are."""
    mistakes = error.errors(include_url=False, include_context=False, include_input=False)
    first = mistakes[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no valid JSON: {first['msg']}", "invalid_json")
    place = ".".join(str(part) for part in first["loc"] if not _is_branch(part))[:200]
    message = f"{place}: {first['msg']}" if place else first["msg"]
    if first["type"] == "extra_forbidden":
        message = f"unknown field '{place}'"
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    return ApiError(422, message[:1000] + more, "invalid_value", param=place or None)


def _is_branch(part: int | str) -> bool:
    """Whether a part of a location is pydantic's name for one of several allowed types: nothing for a client."""
    return isinstance(part, str) and (part == "str" or part.startswith("constrained-") or "[" in part)
