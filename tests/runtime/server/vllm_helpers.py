"""What the tests of the vLLM engine share: a small request, and the backend around it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from dsq.runtime.server.backend import (
    GenerateRequest,
    Step,
)
from dsq.runtime.server.vllm_backend import VllmBackend
from dsq.runtime.server.vllm_process import (
    VllmSettings,
)
from tests.runtime.server.vllm_standin import logits_after

PROMPT = (40, 41, 42)
REQUEST = GenerateRequest(PROMPT, 10)
Test = Callable[[VllmBackend], Awaitable[None]]


def greedy(prompt: tuple[int, ...], n: int, bias: dict[int, float] | None = None) -> list[int]:
    """What the stand-in's model says, worked out here."""
    tokens = list(prompt)
    for _ in range(n):
        logits = [x + (bias or {}).get(i, 0.0) for i, x in enumerate(logits_after(tokens))]
        tokens.append(logits.index(max(logits)))
    return tokens[len(prompt) :]


def run(settings: VllmSettings, test: Test, **more: Any) -> None:
    async def all_of_it() -> None:
        backend = VllmBackend(settings, **more)
        try:
            await backend.start()
            await asyncio.wait_for(test(backend), 60)
        finally:
            await backend.close()

    asyncio.run(all_of_it())


def at(url: str, **more: Any) -> VllmSettings:
    return VllmSettings("tiny", None, url, n_vocab=292, **more)


async def ask(backend: VllmBackend, request: GenerateRequest) -> list[Step]:
    return [step async for step in backend.generate(request)]


def tokens_of(steps: list[Step]) -> list[int]:
    return [token for step in steps for token in step.token_ids]
