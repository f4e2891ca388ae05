"""Sending answers: as one JSON object or as server-sent events, until the client goes away."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, closing, suppress
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from dsq.runtime.server.metrics import RECORD, Record
from dsq.runtime.server.problems import SHUTTING_DOWN, HttpProblem, problem

log = logging.getLogger("dsq.server")

ABORT = "dsq.abort"  # in the scope's extensions: closes the connection without waiting


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def dumps(content: Any) -> bytes:
    """JSON in UTF-8; a lone surrogate, which UTF-8 cannot hold, becomes `?`."""
    return _ENCODER.encode(content).encode("utf-8", errors="replace")


class Json(Response):
    """A JSON answer that is ready."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content)


@dataclass(frozen=True)
class TimeLimits:
    """Seconds. `answer`: the whole of one; `send`: one piece that a client does not take."""

    answer: float = 600.0
    send: float = 60.0
    ping: float = 10.0  # a stream that has nothing to say yet says so this often


class LateJson(Response):
    """A JSON answer that takes a while to make; given up when the client goes away."""

    def __init__(self, make: Callable[[], Coroutine[Any, Any, Any]], limits: TimeLimits) -> None:
        self._make, self._limits = make, limits
        self.background = None  # FastAPI looks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with closing(_Timed(scope, send, self._limits.send)) as timed:
            await self._answer(scope, receive, timed)

    async def _answer(self, scope: Scope, receive: Receive, timed: Send) -> None:
        try:
            content = await _while_connected(self._make(), receive, self._limits.answer)
        except asyncio.CancelledError:  # the server stops, and the time to finish is over
            await _shutting_down(scope, receive, timed)
            raise
        if content is _GONE:
            _broke(scope, CLIENT_GONE, "client-gone")
        else:
            await Json(content)(scope, receive, timed)


class EventStream(Response):
    """`data:` events. An error before the first one is an ordinary HTTP error.

    Later ones are events themselves; that is also what a stream sends that was opened by a ping,
    while a long prompt was being read.
    """

    def __init__(self, make: Callable[[], AsyncGenerator[bytes, None]], limits: TimeLimits) -> None:
        self._make, self._limits = make, limits
        self.background = None
        self._opened = False
        self._busy = False  # something was sent since the last look

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with closing(_Timed(scope, send, self._limits.send)) as timed:
            await self._answer(scope, receive, timed)

    async def _answer(self, scope: Scope, receive: Receive, timed: Send) -> None:
        pings = asyncio.create_task(self._ping(timed))
        stopped: asyncio.CancelledError | None = None
        try:
            result = await _while_connected(self._events(timed), receive, self._limits.answer)
            if result is _GONE:
                _broke(scope, CLIENT_GONE, "client-gone")
        except asyncio.CancelledError as error:  # the server stops; the time to finish is over
            stopped = error
        except Exception as error:
            if not self._opened:
                raise
            found = problem(error)
            if found.status == 500:
                log.error("error in a stream", exc_info=error)
            _broke(scope, found.status, found.code or "error")
            await self._put(timed, event(found.content))
        finally:
            pings.cancel()
            with suppress(asyncio.CancelledError):
                await pings
        if stopped is not None:
            if not self._opened:
                await _shutting_down(scope, receive, timed)
            else:
                _broke(scope, problem(SHUTTING_DOWN).status, "shutdown")
                await self._put(timed, event(problem(SHUTTING_DOWN).content))
        if self._opened:
            with suppress(OSError):
                await timed({"type": "http.response.body", "body": b"", "more_body": False})
        if stopped is not None:
            raise stopped

    async def _events(self, send: Send) -> None:
        async with aclosing(self._make()) as events:
            async for data in events:
                await self._put(send, data)

    async def _put(self, send: Send, data: bytes) -> None:
        self._busy = True
        if not self._opened:
            self._opened = True
            await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _ping(self, send: Send) -> None:
        while True:
            self._busy = False
            await asyncio.sleep(self._limits.ping)
            if not self._busy:
                await self._put(send, b": still at it\n\n")


_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx passes events on at once then
]


def event(content: Any) -> bytes:
    return b"data: " + dumps(content) + b"\n\n"


DONE = b"data: [DONE]\n\n"

_GONE = object()
CLIENT_GONE = 499  # nginx's status for it: in the log and the counters, never sent


def _broke(scope: Scope, status: int, why: str) -> None:
    record: Record | None = scope.get(RECORD)
    if record is not None:
        record.broke(status, why)


async def _shutting_down(scope: Scope, receive: Receive, send: Send) -> None:
    found = problem(SHUTTING_DOWN)
    _broke(scope, found.status, "shutdown")
    await Json(found.content, found.status, dict(found.headers))(scope, receive, send)


async def _while_connected(work: Coroutine[Any, Any, Any], receive: Receive, limit: float) -> Any:
    """The work's result, or `_GONE` when the client has left; HttpProblem after `limit` seconds."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(receive))
    both: set[asyncio.Task[Any]] = {working, leaving}
    try:
        done, _ = await asyncio.wait(both, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if working in done:
            return working.result()
        if leaving in done:
            return _GONE
        raise HttpProblem(504, f"the answer took longer than {limit:g} s", "timeout")
    finally:
        for task in both:
            task.cancel()
        await asyncio.gather(*both, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Timed:
    """`send` that cuts a connection whose reader takes nothing for `limit` seconds. To be closed.

    uvicorn's `send` returns at once while its buffer (64 KiB) has room, and waits when it is full.
    One timer serves all pieces: most are gone before it is looked at.
    """

    def __init__(self, scope: Scope, send: Send, limit: float) -> None:
        self._scope, self._send, self._limit = scope, send, limit
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._n_sending, self._since = 0, 0.0

    async def __call__(self, message: Message) -> None:
        if not self._n_sending:
            self._since = self._loop.time()
            if self._timer is None:
                self._timer = self._loop.call_later(self._limit, self._look)
        self._n_sending += 1
        try:
            await self._send(message)
        finally:
            self._n_sending -= 1

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if not self._n_sending:
            return
        left = self._since + self._limit - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
            return
        log.warning("a client took nothing for %g s; its connection is cut", self._limit)
        _broke(self._scope, CLIENT_GONE, "client-reads-nothing")
        abort = (self._scope.get("extensions") or {}).get(ABORT)
        if abort is not None:
            abort()
