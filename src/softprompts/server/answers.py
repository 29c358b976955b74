"""From the engine's thread to the event loop: the events of one HTTP request, until it ends or nobody listens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple, Self, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.types import Receive, Scope, Send

from softprompts.errors import SoftPromptsError
from softprompts.inference import EngineThread, Event, Output, Request, collect
from softprompts.server.failures import ApiError, from_engine
from softprompts.server.metrics import Metrics

__all__ = ["Answer", "ClientGone", "EventStream", "Told", "told_whole", "unless_gone"]

T = TypeVar("T")


class ClientGone(Exception):
    """The client does not wait for its answer any more."""


class Told(NamedTuple):
    """An event of one of the outputs of an HTTP request."""

    choice: int
    """Number of the output: inputs in order, the ``n`` outputs of each side by side."""
    event: Event


def told_whole(choice: int, output: Output) -> Told:
    """A whole output as one event."""
    return Told(choice, Event("", 0, output.text, output.ids, (), output.finish_reason, output.stop_reason))


class Answer:
    """All outputs of one HTTP request while they come. Use it as a context: what is not finished then is cancelled.

    Args:
        thread: The engine.
        requests: One per input, all with the same ``n``.
        model: What the client asked for.
        metrics: Told about every token.
        timeout_s: Of the whole answer.

    Raises:
        ApiError: The engine refuses one of them; none runs then.
    """

    def __init__(
        self, thread: EngineThread, requests: Sequence[Request], *, model: str, metrics: Metrics, timeout_s: float
    ) -> None:
        self.requests, self._thread, self._model, self._metrics = tuple(requests), thread, model, metrics
        self.count = sum(request.options.n for request in requests)
        self._unfinished = set(range(self.count))
        self._began = time.perf_counter()
        self._deadline, self._timeout_s = self._began + timeout_s, timeout_s
        self._last: dict[int, float] = {}
        self._queue: asyncio.Queue[Told] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        try:
            first = 0
            for request in requests:
                thread.submit(request, _Listener(loop, self._queue, first))
                first += request.options.n
        except SoftPromptsError as error:
            self.close()
            raise from_engine(error, model) from error

    async def more(self) -> list[Told]:
        """Wait for events and return all that are there; empty when all outputs are finished.

        Raises:
            ApiError: An output failed, the time is over, or the engine ended.
        """
        if not self._unfinished:
            return []
        left_s = self._deadline - time.perf_counter()
        try:
            told = [await asyncio.wait_for(self._queue.get(), max(0.0, left_s))]
        except TimeoutError:
            raise ApiError(504, f"the answer took longer than {self._timeout_s:g} s", "timeout") from None
        while not self._queue.empty():
            told.append(self._queue.get_nowait())
        for one in told:
            self._note(one)
        return told

    async def outputs(self) -> list[Output]:
        """Wait for all of it; raises ApiError as :meth:`more`."""
        events: list[list[Event]] = [[] for _ in range(self.count)]
        while told := await self.more():
            for one in told:
                events[one.choice].append(one.event)
        return [collect(own) for own in events]

    def close(self) -> None:
        """Cancel what is not finished."""
        for request in self.requests:
            self._thread.cancel(request.id)
        self._unfinished.clear()

    def __enter__(self) -> Self:
        """Use it for a ``with`` block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Cancel what is not finished."""
        if self._unfinished:
            self.close()

    def _note(self, told: Told) -> None:
        event, now = told.event, time.perf_counter()
        if event.ids:
            last = self._last.get(told.choice)
            if last is None:
                self._metrics.first_token(now - self._began)
            else:
                self._metrics.next_token(now - last)
            self._last[told.choice] = now
        if event.finish_reason is None:
            return
        self._unfinished.discard(told.choice)
        self._metrics.finished(event.finish_reason, now - self._began)
        if event.finish_reason == "cancelled":  # not by us: nobody would be waiting
            raise ApiError(503, "the server is shutting down", "shutting_down", retry_after_s=5)
        if event.finish_reason == "error":
            assert event.error is not None
            raise from_engine(event.error, self._model)


class _Listener:
    """Called on the engine's thread; hands events to the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Told], first: int) -> None:
        self._loop, self._queue, self._first = loop, queue, first

    def __call__(self, event: Event) -> None:
        if not self._loop.is_closed():  # events of cancelled requests may come late
            self._loop.call_soon_threadsafe(self._queue.put_nowait, Told(self._first + event.index, event))


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: HttpRequest, work: Awaitable[T]) -> T:
    """Do something as long as the client waits for it; its body has been read.

    Raises:
        ClientGone: It does not; the work is cancelled.
    """
    doing, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ClientGone
    finally:
        doing.cancel()
        gone.cancel()
        await asyncio.gather(doing, gone, return_exceptions=True)


class EventStream:
    """Server-sent events as an ASGI answer. When the client goes, the source is closed at once.

    Args:
        lines: Yields what is sent.
        on_end: Called however it ends.
        timeout_s: Longest time, for clients that read too slowly.
    """

    status_code = 200

    def __init__(self, lines: AsyncIterator[bytes], on_end: Callable[[], None], timeout_s: float) -> None:
        self._lines, self._on_end, self._timeout_s = lines, on_end, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        pump, gone = asyncio.ensure_future(self._pump(send, headers)), asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({pump, gone}, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not pump.done():
                raise ClientGone
            pump.result()
        finally:
            pump.cancel()
            gone.cancel()
            await asyncio.gather(pump, gone, return_exceptions=True)
            self._on_end()

    async def _pump(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        async for line in self._lines:
            await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
