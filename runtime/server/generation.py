"""Answers as text: one or several generations of a backend, run side by side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from dsq.runtime.server.backend import (
    Backend,
    Finish,
    GenerateRequest,
    TokenLogprobs,
    Usage,
)
from dsq.runtime.server.text_stream import TextStream, TextToken
from dsq.tokenizer_port.tokenizer import Tokenizer

MAX_WAITING_DELTAS = 64  # of several answers together; then their generations wait for the reader


@dataclass(frozen=True)
class Delta:
    """What is new in answer `index`. The last one has `finish` and `usage`.

    `stop_string` is what ended the answer if that was a stop string. `prompt_logprobs` comes once,
    with the first.
    """

    index: int
    text: str
    tokens: tuple[TextToken, ...] = ()
    finish: Finish | None = None
    usage: Usage | None = None
    stop_string: str | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


@dataclass
class Answer:
    """One whole answer."""

    text: str = ""
    tokens: list[TextToken] = field(default_factory=list)
    finish: Finish = "length"
    usage: Usage | None = None
    stop_string: str | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.tokens += delta.tokens
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.finish is not None:
            self.finish, self.usage = delta.finish, delta.usage
            self.stop_string = delta.stop_string


async def one_answer(
    backend: Backend,
    tokenizer: Tokenizer,
    request: GenerateRequest,
    stops: Sequence[str],
    index: int = 0,
    max_seconds: float | None = None,
) -> AsyncGenerator[Delta, None]:
    """The answer's deltas. Stops the backend's generation at a stop string, and when closed.

    After `max_seconds` from the first token, an answer ends once it has a line's end.
    """
    has_line = False
    stream = TextStream(tokenizer, stops)
    begun: Usage | None = None
    first = 0.0
    async with aclosing(backend.generate(request)) as steps:
        async for step in steps:
            first = first or time.perf_counter()
            begun = begun or step.usage
            piece = stream.push(step.token_ids, step.logprobs)
            text, tokens, finish, usage = piece.text, piece.tokens, step.finish, None
            if finish is not None and stream.stop_string is None:
                rest = stream.finish(finish)
                text, tokens = text + rest.text, tokens + rest.tokens
            has_line = has_line or "\n" in text
            if max_seconds and has_line and time.perf_counter() - first > max_seconds:
                finish = finish or "length"
            if stream.stop_string is not None:
                finish = "stop"
            if finish is not None:
                usage = step.usage if step.finish else _so_far(begun, stream.n_tokens, first)
            if text or tokens or finish or step.prompt_logprobs:
                yield Delta(
                    index, text, tokens, finish, usage, stream.stop_string, step.prompt_logprobs
                )
            if finish is not None:
                return


def _so_far(begun: Usage | None, n_tokens: int, first: float) -> Usage:
    """For a generation that is ended here: what its backend said with the first step, and what
    came since. Its drafts are not counted."""
    assert begun is not None, "a backend's first step has its usage"
    predict_ms = (time.perf_counter() - first) * 1e3
    return replace(begun, n_generated=n_tokens, predict_ms=predict_ms)


async def answers(
    backend: Backend,
    tokenizer: Tokenizer,
    requests: Sequence[GenerateRequest],
    stops: Sequence[str],
    max_seconds: float | None = None,
) -> AsyncGenerator[Delta, None]:
    """Deltas of all `requests`, as they come; no more run at once than the backend has slots."""
    if len(requests) == 1:
        only = one_answer(backend, tokenizer, requests[0], stops, 0, max_seconds)
        async with aclosing(only) as deltas:
            async for delta in deltas:
                yield delta
        return
    queue: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue(MAX_WAITING_DELTAS)
    at_once = asyncio.Semaphore(max(1, backend.info.n_slots))

    async def pump(index: int, request: GenerateRequest) -> None:
        end: BaseException | None = None
        async with at_once:
            try:
                source = one_answer(backend, tokenizer, request, stops, index, max_seconds)
                async with aclosing(source) as deltas:
                    async for delta in deltas:
                        await queue.put(delta)
            except Exception as error:
                end = error
        await queue.put(end)

    tasks = [asyncio.create_task(pump(i, request)) for i, request in enumerate(requests)]
    left = len(tasks)
    try:
        while left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
