"""uvicorn, with what it lacks: silent connections end, slow readers are cut, SIGTERM drains."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsq.errors import InputError
from dsq.runtime.server.transport import ABORT

MAX_CONNECTIONS = 1024
FIRST_BYTES_SECONDS = 30.0  # a connection that has not asked for anything by then is closed
SIGNALS = (signal.SIGINT, signal.SIGTERM)

log = logging.getLogger("dsq.server")


class Protocol(H11Protocol):
    """One connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._asked = False
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
            return
        self._silent = self.loop.call_later(FIRST_BYTES_SECONDS, self._close_if_silent)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.scope is not None:
            self._asked = True
            extensions: dict[str, Any] = self.scope.setdefault("extensions", {})
            extensions[ABORT] = self.transport.abort

    def connection_lost(self, exc: Exception | None) -> None:
        silent = getattr(self, "_silent", None)
        if silent is not None:
            silent.cancel()
        super().connection_lost(exc)

    def _close_if_silent(self) -> None:
        if not self._asked:
            self.transport.abort()


class _Server(uvicorn.Server):
    """Signals end the serving, and are not raised again afterwards: to be told to stop is no
    failure."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._stop, number)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def _stop(self, number: int) -> None:
        name = signal.Signals(number).name
        if self.should_exit:
            log.info("%s again: leaving now", name)
            self.force_exit = True
            return
        log.info(
            "%s: finishing what runs, at most %d s; a second signal ends it at once",
            name,
            self.config.timeout_graceful_shutdown or 0,
        )
        # What is cut off then would be told with a traceback for each request.
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises InputError: before a model is loaded, not after."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        what = error.strerror or str(error)
        raise InputError(
            f"cannot listen on {host} port {port}: {what}; give another --host or --port"
        ) from None


def uvicorn_config(app: ASGIApp, drain_seconds: int = 30) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=drain_seconds,
    )


def serve(
    app: ASGIApp,
    where: socket.socket,
    *,
    before: Callable[[], Awaitable[None]],
    after: Callable[[], Awaitable[None]],
    drain_seconds: int = 30,
) -> None:
    """Serve until SIGTERM or SIGINT; then answer what is in flight, at most `drain_seconds` long.

    `before` runs first, in the same event loop: it loads the model. `after` runs in any case.
    """

    async def run() -> None:
        try:
            await before()
            await _Server(uvicorn_config(app, drain_seconds)).serve(sockets=[where])
        finally:
            await after()

    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    asyncio.run(run())
