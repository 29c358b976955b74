"""The process: a socket, signals, and an end that loses no answer."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from types import FrameType

import uvicorn

from softprompts.server.app import build_app
from softprompts.server.edge import JsonLines
from softprompts.server.service import Service

__all__ = ["HttpServer", "log_as_json", "run"]

_log = logging.getLogger("softprompts.server")


def log_as_json(level: str = "info") -> None:
    """Let all loggers of this process write JSON lines to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class HttpServer(uvicorn.Server):
    """Uvicorn, which on the first SIGTERM or SIGINT keeps its socket, answers new requests 503 and finishes the others.

    Args:
        service: What is served.
        host: Address to listen on.
        port: 0 takes a free one.
    """

    def __init__(self, service: Service, host: str, port: int) -> None:
        super().__init__(
            uvicorn.Config(
                build_app(service),
                host=host,
                port=port,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                lifespan="off",
                timeout_graceful_shutdown=5,
            )
        )
        self._service = service
        self._stop_at: float | None = None

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Where it listens, once it has started."""
        return [socket.getsockname()[:2] for server in self.servers for socket in server.sockets]

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Listen, and say where."""
        await super().startup(sockets)  # type: ignore[arg-type]
        for host, port in self.addresses if self.started else ():
            _log.info("listening", extra={"fields": {"url": f"http://{host}:{port}", "pid": os.getpid()}})

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; the second signal ends at once."""
        if self._stop_at is None:
            self.drain()
        else:
            super().handle_exit(sig, frame)

    def drain(self) -> None:
        """Take no more requests, finish the others, then stop."""
        self._service.draining = True
        self._stop_at = time.monotonic() + self._service.settings.drain_s

    async def on_tick(self, counter: int) -> bool:
        """Uvicorn asks ten times a second whether it shall stop."""
        if self._stop_at is not None and not self.should_exit:
            left = self._service.in_flight
            if not left or time.monotonic() >= self._stop_at:
                _log.info("stopping", extra={"fields": {"unfinished": left}})
                if left:
                    await asyncio.to_thread(self._service.thread.stop)  # its requests are told that they are cancelled
                self.should_exit = True
        return await super().on_tick(counter)


def run(service: Service, host: str, port: int) -> None:
    """Serve until a signal comes; everything is stopped then.

    Args:
        service: With an engine that has not been started.
        host: Address.
        port: 0 takes a free one.
    """
    with service.pool, service.thread:
        HttpServer(service, host, port).run()
