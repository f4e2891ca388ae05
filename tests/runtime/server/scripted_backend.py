"""A backend that says what the test wants, a server around it, and what it was asked."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from dsq.runtime.server.app import build_app
from dsq.runtime.server.backend import (
    BackendStats,
    GenerateRequest,
    ModelInfo,
    Step,
    TokenLogprobs,
    Usage,
)
from dsq.runtime.server.limits import Limits
from dsq.runtime.server.listen import listen, uvicorn_config
from dsq.runtime.server.models import ModelPool, Offer
from dsq.runtime.server.transport import TimeLimits
from dsq.tokenizer_port.tokenizer import Tokenizer

Script = Callable[[GenerateRequest], Iterable[int | Exception]]


class ScriptedBackend:
    """Answers with the tokens of `script`, then stops; an exception in it is raised.

    `hold` keeps every request before token `hold_at` until it is set, from any thread.
    """

    def __init__(self, script: Script, *, n_ctx: int = 100, n_vocab: int = 292) -> None:
        self.script = script
        self.info = ModelInfo("scripted", n_ctx, n_ctx, n_vocab, 4, 0, 0, "f16")
        self.requests: list[GenerateRequest] = []
        self.n_running = 0
        self.n_closed_early = 0
        self.healthy = True
        self.started = self.closed = False
        self.hold: threading.Event | None = None
        self.hold_at = 0

    async def start(self) -> None:
        self.started = True

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Step, None]:
        self.requests.append(request)
        self.n_running += 1
        ended = False
        n = 0
        try:
            first = self._prompt_logprobs(request)
            for item in self.script(request):
                while self.hold is not None and n >= self.hold_at and not self.hold.is_set():
                    await asyncio.sleep(0.005)
                await asyncio.sleep(0)
                if isinstance(item, Exception):
                    raise item
                if item in request.stop_ids:
                    break
                n += 1
                finish = "length" if n >= request.max_tokens else None
                ended = finish is not None
                logprobs = (_logprobs(item, request.n_logprobs),) if request.n_logprobs else None
                usage = self._usage(request, n) if ended or n == 1 else None
                yield Step((item,), logprobs, first, finish, usage)
                first = None
                if ended:
                    return
            ended = True
            yield Step(
                (), () if request.n_logprobs else None, first, "stop", self._usage(request, n)
            )
        finally:
            self.n_running -= 1
            self.n_closed_early += not ended

    def _usage(self, request: GenerateRequest, n: int) -> Usage:
        return Usage(len(request.prompt_ids), 1, n, 10.0, 20.0, 5, 3)

    def _prompt_logprobs(self, request: GenerateRequest) -> tuple[TokenLogprobs | None, ...] | None:
        if not request.prompt_logprobs:
            return None
        found = [_logprobs(token, request.n_logprobs) for token in request.prompt_ids[1:]]
        return (None, *found)

    async def stats(self) -> BackendStats:
        return BackendStats(4, self.n_running, 0, 10, 100, 1, 1, 1, 0, 0, 1.0, 1.0, 7.5, 2**20, 0)

    async def close(self) -> None:
        self.closed = True


def _logprobs(token: int, n: int) -> TokenLogprobs:
    top = [(token, -0.5), *((other, -1.0 - other) for other in range(1, n))]
    return TokenLogprobs(-0.5, tuple(top[:n]))


def pool_of(backend: ScriptedBackend, tokenizer: Tokenizer, name: str = "tiny") -> ModelPool:
    return ModelPool({name: Offer(Path(name), 1)}, lambda _: backend, lambda _: tokenizer)


@contextmanager
def serving(
    pool: ModelPool,
    limits: Limits | None = None,
    times: TimeLimits | None = None,
    drain_seconds: int = 5,
) -> Iterator[str]:
    """The base URL of a real server, in a thread."""
    server = uvicorn.Server(uvicorn_config(build_app(pool, limits, times), drain_seconds))
    with listen("127.0.0.1", 0) as where:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[where])))
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield f"http://127.0.0.1:{where.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def wait_until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.002)
