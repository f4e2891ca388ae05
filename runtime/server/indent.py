"""llama.cpp's `n_indent`: a completion ends before a line that is indented less.

A backend around another one, so that whole answers and streams end at the same token. Blank lines
count as none (llama.cpp ends at them): a function's body may have them.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from dsq.runtime.server.backend import (
    Backend,
    BackendStats,
    GenerateRequest,
    ModelInfo,
    Step,
    Usage,
)
from dsq.tokenizer_port.tokenizer import Tokenizer


class Indentation:
    """Push the text as it comes; True once a line after the first has too little white space."""

    def __init__(self, least: int) -> None:
        self._least = least
        self._so_far: int | None = None  # of the line that begins; None: its text has begun

    def falls_short(self, text: str) -> bool:
        for c in text:
            if c == "\n":
                self._so_far = 0
            elif self._so_far is None or c == "\r":
                continue
            elif c in " \t":
                self._so_far += 1
            elif self._so_far < self._least:
                return True
            else:
                self._so_far = None
        return False


class IndentedBackend:
    """`backend`, whose answers end as "length" before the token that is indented less."""

    def __init__(self, backend: Backend, tokenizer: Tokenizer, least: int) -> None:
        self._backend, self._tokenizer, self._least = backend, tokenizer, least

    @property
    def info(self) -> ModelInfo:
        return self._backend.info

    @property
    def healthy(self) -> bool:
        return self._backend.healthy

    async def start(self) -> None:
        await self._backend.start()

    async def stats(self) -> BackendStats:
        return await self._backend.stats()

    async def close(self) -> None:
        await self._backend.close()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Step, None]:
        decoder, lines = self._tokenizer.stream_decoder(), Indentation(self._least)
        n, began, usage = 0, 0.0, None
        async with aclosing(self._backend.generate(request)) as steps:
            async for step in steps:
                began, usage = began or time.perf_counter(), usage or step.usage
                for i, token in enumerate(step.token_ids):
                    if lines.falls_short(decoder.push(token)):
                        yield _cut(step, i, _so_far(usage, n + i, began))
                        return
                n += len(step.token_ids)
                yield step


def _cut(step: Step, n: int, usage: Usage) -> Step:
    logprobs = step.logprobs[:n] if step.logprobs is not None else None
    return Step(step.token_ids[:n], logprobs, step.prompt_logprobs, "length", usage)


def _so_far(begun: Usage | None, n_tokens: int, began: float) -> Usage:
    assert begun is not None, "a backend's first step has its usage"
    predict_ms = (time.perf_counter() - began) * 1e3
    return replace(begun, n_generated=n_tokens, predict_ms=predict_ms)
