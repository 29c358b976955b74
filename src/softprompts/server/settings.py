"""What whoever runs the server decides."""

from __future__ import annotations

from dataclasses import dataclass

from softprompts.errors import ConfigError

__all__ = ["ServerSettings"]


@dataclass(frozen=True)
class ServerSettings:
    """Limits and switches of the server; those of the engine are :class:`softprompts.inference.ServingLimits`."""

    model_name: str
    """What the bare model is called in requests."""
    max_body_bytes: int = 1 << 20
    """Longest body of a request; longer ones are answered 413."""
    max_outputs: int = 64
    """Most outputs of one request: inputs times ``n``."""
    max_output_tokens: int = 4096
    """Most ``max_tokens``."""
    request_timeout_s: float = 300.0
    """A request that takes longer is cancelled: 504."""
    body_timeout_s: float = 30.0
    """How long a client may take to send its body: 408."""
    drain_s: float = 30.0
    """How long requests that run may go on after SIGTERM."""
    allow_loading: bool = False
    """Whether keys marked ``admin`` may load and unload prompts."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            ConfigError: A number is out of its range, or the model has no name.
        """
        if not self.model_name:
            raise ConfigError("the served model has no name; give it one")
        for name in ("max_body_bytes", "max_outputs", "max_output_tokens", "request_timeout_s", "body_timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected more than 0")
        if self.drain_s < 0:
            raise ConfigError(f"drain_s is {self.drain_s}, expected 0 or more")
