"""One way from a request to an answer: find the model, prepare, generate, shape."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

from fastapi import Request
from starlette.responses import Response

from dsq.runtime.server.backend import Backend
from dsq.runtime.server.bodies import NativeBody, SamplingBody
from dsq.runtime.server.generation import Answer, Delta, answers
from dsq.runtime.server.indent import IndentedBackend
from dsq.runtime.server.limits import Limits
from dsq.runtime.server.metrics import RECORD, Metrics, Record
from dsq.runtime.server.models import Model, ModelPool
from dsq.runtime.server.prepare import Prepared
from dsq.runtime.server.repos import Repositories
from dsq.runtime.server.transport import EventStream, LateJson, TimeLimits

LARGE_BODY = 4096  # bytes; the text of a larger one is tokenized in a thread
_Body = TypeVar("_Body", bound=SamplingBody)


class Shape(Protocol):
    """How answers look."""

    prepared: Prepared

    def answer(self, answers: Sequence[Answer]) -> Any: ...
    def events(self, delta: Delta) -> Iterator[bytes]: ...
    def end(self) -> Iterator[bytes]: ...


class Service:
    """The models, and what every request to them goes through."""

    def __init__(
        self, pool: ModelPool, limits: Limits, times: TimeLimits, repos: Repositories
    ) -> None:
        self.pool, self.limits, self.times, self.repos = pool, limits, times, repos
        self.metrics = Metrics()

    def respond(
        self, request: Request, body: _Body, shape: Callable[[_Body, Model], Shape]
    ) -> Response:
        record: Record = request.scope[RECORD]
        large = int(request.headers.get("content-length") or LARGE_BODY) >= LARGE_BODY or body.repo

        async def deltas() -> AsyncGenerator[tuple[Shape, Delta], None]:
            async with self.pool.use(body.model) as model:
                record.model = model.name
                if large:
                    made = await asyncio.to_thread(shape, body, model)
                else:
                    made = shape(body, model)
                prepared = made.prepared
                if self.limits.log_prompts:
                    ids = prepared.requests[0].prompt_ids
                    record.prompt = model.tokenizer.decode(ids, skip_special=False)
                backend: Backend = model.backend
                if isinstance(body, NativeBody) and body.n_indent:
                    backend = IndentedBackend(backend, model.tokenizer, body.n_indent)
                found = answers(
                    backend,
                    model.tokenizer,
                    prepared.requests,
                    prepared.stops,
                    prepared.max_seconds,
                )
                asked = time.perf_counter()
                async with aclosing(found):
                    async for delta in found:
                        record.came(time.perf_counter(), asked, len(delta.tokens))
                        if delta.usage is not None and delta.finish is not None:
                            record.add(delta.usage, delta.finish)
                        yield made, delta
                        asked = time.perf_counter()

        async def whole() -> Any:
            found: dict[int, Answer] = {}
            made: Shape | None = None
            async with aclosing(deltas()) as source:
                async for shaped, delta in source:
                    made = shaped
                    found.setdefault(delta.index, Answer()).add(delta)
            assert made is not None  # an answer has at least the delta that ends it
            return made.answer([found[i] for i in sorted(found)])

        async def events() -> AsyncGenerator[bytes, None]:
            made: Shape | None = None
            async with aclosing(deltas()) as source:
                async for made, delta in source:
                    for data in made.events(delta):
                        yield data
            if made is not None:
                for data in made.end():
                    yield data

        return EventStream(events, self.times) if body.stream else LateJson(whole, self.times)
