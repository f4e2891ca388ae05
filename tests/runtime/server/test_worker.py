"""The worker process behind its client: streams, cancels, deaths and restarts."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from dsq.errors import InputError
from dsq.runtime.generate import generate
from dsq.runtime.llamacpp import LlamaCppEngine
from dsq.runtime.sampling import GREEDY
from dsq.runtime.server import client
from dsq.runtime.server.backend import (
    Backend,
    Busy,
    GenerateRequest,
    PromptTooLong,
    Sampling,
    Step,
    Usage,
    WorkerDied,
)
from dsq.runtime.server.client import WorkerBackend
from dsq.runtime.server.frames import pack
from dsq.runtime.server.llama_batch import LlamaSettings

PROMPTS = [list(range(60 + 3 * i, 90 + 5 * i)) for i in range(12)]
LONG = 200


@pytest.fixture
def settings(tiny: Path) -> LlamaSettings:
    return LlamaSettings(str(tiny), n_ctx=256, kv_size=1024, n_threads=1)


Test = Callable[[WorkerBackend], Awaitable[None]]


def _with_backend(settings: LlamaSettings, test: Test, **more: float) -> None:
    async def run() -> None:
        backend = WorkerBackend(settings, **more)  # type: ignore[arg-type]
        await backend.start()
        try:
            await asyncio.wait_for(test(backend), 150)
        finally:
            await backend.close()

    asyncio.run(run())


def _stream(backend: WorkerBackend, prompt: Sequence[int], n: int) -> AsyncGenerator[Step, None]:
    return backend.generate(GenerateRequest(tuple(prompt), n))


async def _ask(
    backend: WorkerBackend, prompt: Sequence[int], n: int = 24
) -> tuple[tuple[int, ...], Usage | None]:
    tokens: list[int] = []
    async for step in _stream(backend, prompt, n):
        tokens += step.token_ids
    return tuple(tokens), step.usage


def _alone(engine: LlamaCppEngine, prompt: Sequence[int], n: int = 24) -> tuple[int, ...]:
    made = generate(engine, prompt, max_tokens=n, stop_ids=frozenset(), sampler=GREEDY)
    return made.result.tokens


def test_many_at_once_get_each_its_own(settings: LlamaSettings, engine: LlamaCppEngine) -> None:
    async def test(backend: WorkerBackend) -> None:
        checked: Backend = backend
        assert checked.healthy
        assert (checked.info.n_ctx, checked.info.n_vocab, checked.info.n_slots) == (256, 293, 4)
        answers = await asyncio.gather(*(_ask(backend, p) for p in PROMPTS))
        assert [tokens for tokens, _ in answers] == [_alone(engine, p) for p in PROMPTS]
        stats = await checked.stats()
        assert stats.generated_tokens_total == 24 * len(PROMPTS)
        assert stats.prompt_tokens_total + stats.cached_tokens_total == sum(map(len, PROMPTS))
        assert (stats.n_busy, stats.n_queued, stats.restarts) == (0, 0, 0)
        assert stats.memory_bytes > 10e6
        assert 0 < stats.kv_used <= stats.kv_size

    _with_backend(settings, test)


def test_a_second_request_joins_while_the_first_streams(settings: LlamaSettings) -> None:
    async def test(backend: WorkerBackend) -> None:
        async with aclosing(_stream(backend, PROMPTS[0], LONG)) as first:
            n = len((await anext(first)).token_ids)
            short, _ = await _ask(backend, PROMPTS[1], 3)
            assert len(short) == 3
            rest = [step async for step in first]
        assert n + sum(len(s.token_ids) for s in rest) == LONG
        assert [s.finish for s in rest if s.finish] == ["length"]

    _with_backend(settings, test)


def test_closing_the_stream_frees_the_only_slot(settings: LlamaSettings) -> None:
    async def test(backend: WorkerBackend) -> None:
        for _ in range(3):
            async with aclosing(_stream(backend, PROMPTS[0], LONG)) as stream:
                await anext(stream)
        await _ask(backend, PROMPTS[1], 3)
        stats = await backend.stats()
        assert (stats.n_busy, stats.n_queued) == (0, 0)
        assert stats.generated_tokens_total < 3 * LONG

    _with_backend(replace(settings, n_parallel=1), test)


def test_a_reader_that_is_slow_gets_all_in_few_steps(settings: LlamaSettings) -> None:
    async def test(backend: WorkerBackend) -> None:
        async with aclosing(_stream(backend, PROMPTS[0], 50)) as stream:
            tokens = list((await anext(stream)).token_ids)
            await _ask(backend, PROMPTS[1], 100)  # meanwhile the other one is done
            rest = await anext(stream)
            assert rest.finish == "length"
            assert rest.usage is not None
            assert len(tokens) + len(rest.token_ids) == rest.usage.n_generated == 50

    _with_backend(settings, test)


def test_the_same_beginning_is_cached(settings: LlamaSettings) -> None:
    async def test(backend: WorkerBackend) -> None:
        _, before = await _ask(backend, PROMPTS[3])
        _, after = await _ask(backend, [*PROMPTS[3], 7, 8])
        assert before is not None
        assert after is not None
        assert (before.n_cached, after.n_cached) == (0, len(PROMPTS[3]))

    _with_backend(settings, test)


def test_a_killed_worker_is_replaced(settings: LlamaSettings, engine: LlamaCppEngine) -> None:
    async def test(backend: WorkerBackend) -> None:
        await _ask(backend, PROMPTS[1])
        async with aclosing(_stream(backend, PROMPTS[0], LONG)) as stream:
            await anext(stream)
            assert backend.worker_pid is not None
            os.kill(backend.worker_pid, signal.SIGKILL)
            with pytest.raises(WorkerDied, match="SIGKILL.*send the request again"):
                async for _ in stream:
                    pass
        assert not backend.healthy
        answer, _ = await _ask(backend, PROMPTS[1])  # waits for the new worker
        assert backend.healthy
        assert answer == _alone(engine, PROMPTS[1])
        stats = await backend.stats()
        assert stats.restarts == 1
        assert stats.generated_tokens_total >= 49, "counters go on over restarts"

    _with_backend(settings, test)


def test_a_request_does_not_wait_forever_for_a_worker(
    settings: LlamaSettings, tmp_path: Path
) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(Path(settings.path).read_bytes())

    async def test(backend: WorkerBackend) -> None:
        model.unlink()
        assert backend.worker_pid is not None
        os.kill(backend.worker_pid, signal.SIGKILL)
        with pytest.raises(WorkerDied):
            await _ask(backend, PROMPTS[0], LONG)
        with pytest.raises(WorkerDied, match="not ready after"):
            await _ask(backend, PROMPTS[0])
        stats = await backend.stats()
        assert (stats.n_busy, stats.n_queued) == (0, 0)

    _with_backend(replace(settings, path=str(model)), test, restart_wait_s=0.2)


def test_a_full_queue_is_busy(settings: LlamaSettings) -> None:
    async def test(backend: WorkerBackend) -> None:
        async with aclosing(_stream(backend, PROMPTS[0], LONG)) as running:
            await anext(running)
            waiting = asyncio.create_task(_ask(backend, PROMPTS[1], 3))
            await asyncio.sleep(0)
            with pytest.raises(Busy, match="1 requests wait already") as caught:
                await _ask(backend, PROMPTS[2])
            assert 1 <= caught.value.retry_after_s <= 60
        assert len((await waiting)[0]) == 3

    _with_backend(replace(settings, n_parallel=1), test, max_queued=1)


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_many_clients_with_random_cancels(
    settings: LlamaSettings, engine: LlamaCppEngine, seconds: int
) -> None:
    """Nothing is mixed up, nothing leaks: each answer is what its prompt gets alone."""
    rng = random.Random(0)
    expected = [_alone(engine, p) for p in PROMPTS]
    counts: Counter[str] = Counter()

    async def client(backend: WorkerBackend, end: float) -> None:
        while time.monotonic() < end:
            i, most = rng.randrange(len(PROMPTS)), rng.choice((1, 5, 24, 24, 24))
            tokens: list[int] = []
            try:
                async with aclosing(_stream(backend, PROMPTS[i], 24)) as stream:
                    async for step in stream:
                        tokens += step.token_ids
                        if len(tokens) >= most:
                            break
            except Busy:
                counts["busy"] += 1
                await asyncio.sleep(0.05)
                continue
            counts["whole" if len(tokens) == 24 else "cut"] += 1
            assert tuple(tokens) == expected[i][: len(tokens)]

    async def test(backend: WorkerBackend) -> None:
        end = time.monotonic() + seconds
        await asyncio.gather(*(client(backend, end) for _ in range(64)))
        assert len((await _ask(backend, PROMPTS[0], 3))[0]) == 3
        stats = await backend.stats()
        assert (stats.n_busy, stats.n_queued, stats.restarts) == (0, 0, 0)
        assert min(counts["whole"], counts["cut"], counts["busy"]) > 5

    # Room for some only, and a cache that is too small for all: requests are put back, too.
    _with_backend(replace(settings, kv_size=256), test, max_queued=40)


def test_threads_that_share_cores_do_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "free_cores", lambda: 2)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert client._environment(None) is None
    assert client._environment(2) is None
    made = client._environment(3)
    assert made is not None
    assert made == {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert client._environment(3) is None, "who sets it knows why"


@pytest.mark.slow
def test_memory_stays_flat_over_two_thousand_requests(settings: LlamaSettings) -> None:
    """Short and long, plain and constrained, whole and cut."""
    rng = random.Random(0)

    async def one(backend: WorkerBackend) -> None:
        prompt = tuple(rng.randrange(10, 290) for _ in range(rng.randrange(1, 100)))
        request = GenerateRequest(
            prompt,
            rng.randrange(1, 12),
            sampling=Sampling(temperature=rng.choice((0.0, 1.0)), seed=1),
            n_logprobs=rng.choice((0, 0, 3)),
            grammar=rng.choice((None, None, 'root ::= "a"+')),
        )
        async with aclosing(backend.generate(request)) as stream:
            async for _ in stream:
                if rng.random() < 0.03:
                    break

    async def many(backend: WorkerBackend, n: int) -> int:
        for _ in range(n // 20):
            await asyncio.gather(*(one(backend) for _ in range(20)))
        await asyncio.sleep(1.1)  # the worker looks once a second
        await _ask(backend, [40], 3)
        return (await backend.stats()).memory_bytes

    async def test(backend: WorkerBackend) -> None:
        before = await many(backend, 200)  # pools have their size then
        after = await many(backend, 2000)
        print(f"{before / 2**20:.1f} MiB, then {after / 2**20:.1f} MiB")
        assert after == pytest.approx(before, rel=0.02)

    _with_backend(settings, test)


def test_what_is_wrong_with_a_request_comes_at_the_first_step(settings: LlamaSettings) -> None:
    async def test(backend: WorkerBackend) -> None:
        with pytest.raises(PromptTooLong) as caught:
            await _ask(backend, [40] * 300)
        assert (caught.value.n_prompt, caught.value.n_ctx) == (300, 256)
        bad = GenerateRequest((40,), 5, grammar="root ::= (")
        with pytest.raises(InputError, match="not valid GBNF"):
            await anext(backend.generate(bad))
        assert len((await _ask(backend, PROMPTS[0], 3))[0]) == 3

    _with_backend(settings, test)


def test_a_model_that_cannot_be_loaded(settings: LlamaSettings, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))

    async def run() -> None:
        backend = WorkerBackend(replace(settings, path=str(broken)))
        with pytest.raises(InputError, match=r"broken\.gguf: llama\.cpp cannot load it"):
            await backend.start()
        await backend.close()

    asyncio.run(run())


def test_closing_ends_requests_and_the_process(settings: LlamaSettings) -> None:
    async def run() -> None:
        backend = WorkerBackend(settings)
        await backend.start()
        pid = backend.worker_pid
        assert pid is not None
        async with aclosing(_stream(backend, PROMPTS[0], LONG)) as stream:
            await anext(stream)
            await backend.close()
            with pytest.raises(WorkerDied, match="shutting down"):
                async for _ in stream:
                    pass
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        await backend.close()

    asyncio.run(run())


def test_the_worker_ends_when_its_server_does(settings: LlamaSettings) -> None:
    """In the middle of an answer, by the end of its input alone; and only by that."""
    command = [sys.executable, "-m", "dsq.runtime.server.worker"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(pack({"engine": "llama.cpp", "settings": vars(settings)}))
        worker.stdin.flush()
        assert worker.stdout.read(8)  # it is ready: signals are in place
        worker.send_signal(signal.SIGTERM)
        worker.send_signal(signal.SIGINT)
        worker.stdin.close()
        assert worker.stdout.read().startswith(b'{"op":"ready"')
        assert worker.wait(20) == 0
