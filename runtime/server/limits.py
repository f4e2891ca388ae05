"""The gate in front of the application: who may come in, how much they may send, how many at once.

Plain ASGI, because Starlette's ready-made base class for middleware copies every streamed event.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsq.errors import InputError
from dsq.runtime.server.metrics import RECORD, Metrics, Record, log
from dsq.runtime.server.problems import HttpProblem, problem
from dsq.runtime.server.transport import CLIENT_GONE, Json

DRAIN = 8  # a body this many times too large is still read to its end, so that the 413 arrives


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, times in seconds."""

    api_keys: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()
    hosts: frozenset[str] | None = None  # names a Host header may have; None: any
    max_body: int = 16 * 2**20
    body_seconds: float = 30.0
    max_requests: int = 512  # at once; beyond it 429
    log_prompts: bool = False


LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


def check_binding(host: str, api_keys: Collection[str]) -> bool:
    """Whether `host` is this machine alone. Raises InputError if it is not and there is no key."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if any(len(key) < 8 for key in api_keys):
        raise InputError("--api-key is shorter than 8 characters; take a longer one")
    if not local and not api_keys:
        raise InputError(
            f"--host {host}: others can reach this server; give --api-key, "
            "or leave --host out to serve this machine alone"
        )
    return local


class Gate:
    """Counts, logs, checks origin, host and key, and reads the body before the application does."""

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        metrics: Metrics,
        public: Collection[str],
        routes: Collection[str],
    ) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._public, self._routes = frozenset(public), frozenset(routes)
        self._keys = [key.encode() for key in limits.api_keys]
        self._n_now = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        record = scope[RECORD] = Record(route=self._route(scope["path"]))

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
            await send(message)

        self._n_now += 1
        self._metrics.in_flight.set(self._n_now)
        try:
            await self._through(scope, receive, watched)
        except HttpProblem as error:
            found = problem(error)
            record.broke(found.status, error.code)
            answer = Json(found.content, found.status, dict(found.headers))
            await answer(scope, receive, watched)
        except Exception as error:  # the application has answered and logged it, and raises again
            if not record.status:
                raise
            log.debug("%s", error)
        finally:
            self._n_now -= 1
            self._metrics.in_flight.set(self._n_now)
            ended = time.perf_counter()
            record.status = record.status or CLIENT_GONE
            self._metrics.finished(record, ended)
            if record.route not in ("/health", "/metrics", "/stats") or record.status >= 400:
                log.info("%s", record.line(scope["method"], ended))

    def _route(self, path: str) -> str:
        """In the route's own words: what else a client writes into a path is not logged."""
        if path in self._routes:
            return path
        return "/v1/models/{name}" if path.startswith("/v1/models/") else "other"

    async def _through(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        self._check_origin(headers)
        if scope["path"] not in self._public and scope["method"] != "OPTIONS":
            self._check_key(headers)
        if self._n_now > self._limits.max_requests:
            raise HttpProblem(
                429, f"{self._n_now - 1} requests are open already", "busy", Retry_After="2"
            )
        if scope["method"] in ("POST", "PUT", "PATCH"):
            body = await self._body(headers, receive)
            receive = _replayed(body, receive)
            scope = {**scope, "headers": _as_json(scope["headers"])}
        await self._app(scope, receive, send)

    def _check_origin(self, headers: dict[bytes, bytes]) -> None:
        """No other site's page may use this server through its visitor's browser.

        CORS alone keeps such a page from reading answers, not from sending requests; and a name
        that is made to point to 127.0.0.1 (DNS rebinding) gets around CORS.
        """
        host = headers.get(b"host", b"").decode("latin-1")
        names = self._limits.hosts
        if names is not None and _name(host) not in names:
            raise HttpProblem(403, "this server answers to localhost only", "host")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if not origin or origin in self._limits.cors or "*" in self._limits.cors:
            return
        if _netloc(origin) != host:
            raise HttpProblem(
                403, "pages of this origin may not use this server; see --cors", "origin"
            )

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        if not self._keys:
            return
        given = headers.get(b"x-api-key", b"")
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer":
            given = token.strip()
        # Every key is compared, so that the time does not tell which one was nearly right.
        if not sum([hmac.compare_digest(given, key) for key in self._keys]):
            raise HttpProblem(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                "invalid_api_key",
                WWW_Authenticate="Bearer",
            )

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body. Raises HttpProblem for one that is too large or too slow."""
        limit = self._limits.max_body
        try:
            announced = int(headers.get(b"content-length", b"0"))
        except ValueError:
            announced = 0
        too_large = HttpProblem(
            413, f"the body is larger than {limit >> 20} MiB", "body_too_large", Connection="close"
        )
        if announced > limit * DRAIN or (announced > limit and b"expect" in headers):
            raise too_large
        try:
            return await asyncio.wait_for(
                _read(receive, limit, too_large), self._limits.body_seconds
            )
        except asyncio.TimeoutError:
            raise HttpProblem(
                408,
                f"the body did not come within {self._limits.body_seconds:g} s",
                "body_too_slow",
                Connection="close",
            ) from None


async def _read(receive: Receive, limit: int, too_large: HttpProblem) -> bytes:
    parts: list[bytes] = []
    n = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise HttpProblem(499, "the client left before its body had come", "disconnected")
        part = message.get("body", b"")
        n += len(part)
        if n > limit:
            parts.clear()
        else:
            parts.append(part)
        if n > limit * DRAIN:
            raise too_large
        if not message.get("more_body", False):
            break
    if n > limit:
        raise too_large
    return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _as_json(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """All bodies are JSON here, and `curl -d` says that it sends a form. What the header guards
    against, forms of other pages, `_check_origin` refuses."""
    others = [(name, value) for name, value in headers if name != b"content-type"]
    return [*others, (b"content-type", b"application/json")]


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:  # http://[
        return None


def _name(host: str) -> str:
    """A Host header without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""
