"""VllmBackend: the Backend over vLLM's own HTTP server, in an environment of its own.

vLLM wants another torch than dsq, so it is never imported. `vllm serve` runs as a child process
that is started, watched and restarted; or somebody else runs it, on however many machines.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

from dsq.errors import DsqError, InputError
from dsq.runtime.server.backend import (
    BackendStats,
    Busy,
    GenerateRequest,
    ModelInfo,
    PromptTooLong,
    Step,
    Usage,
    WorkerDied,
)
from dsq.runtime.server.vllm_client import VllmClient
from dsq.runtime.server.vllm_process import (
    VllmProcess,
    VllmSettings,
    environment,
    resident_bytes,
    serve_command,
)
from dsq.runtime.server.vllm_protocol import Events, completion_body, gauges
from dsq.runtime.server.vllm_tokenizer import write_padded_tokenizer

_RATE_SECONDS = 10.0
_LOOK_S = 0.2  # how often a starting vLLM is asked
_WATCH_S = 2.0  # how often one at a URL is asked
_LONGEST_PAUSE = 30.0  # between attempts to restart a vLLM that cannot start

log = logging.getLogger("dsq.server")


class VllmBackend:
    """See `dsq.runtime.server.backend.Backend`.

    What differs: the penalties look at the whole text; `n_cached` is known only at an answer's
    end; `prompt_seconds_total` and `predict_seconds_total` are sums over requests, as vLLM does not
    tell its steps; `lookup` has no effect, drafts being an option of vLLM as a whole.
    """

    def __init__(
        self, settings: VllmSettings, *, max_queued: int = 64, restart_wait_s: float = 30.0
    ) -> None:
        self._settings = settings
        self._max_queued, self._restart_wait_s = max_queued, restart_wait_s
        self._info: ModelInfo | None = None
        self._model = ""  # its name in vLLM
        self._client: VllmClient | None = None
        self._process: VllmProcess | None = None
        self._ready, self._closing = asyncio.Event(), asyncio.Event()
        self._started: asyncio.Future[None] | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._n_running = 0
        self._restarts = 0
        self._recent: deque[tuple[float, int]] = deque()
        self._mean_s = 1.0  # how long a request takes
        self._total = Usage(0, 0, 0, 0.0, 0.0)  # of all requests

    @property
    def info(self) -> ModelInfo:
        if self._info is None:
            raise RuntimeError("the backend has not been started")
        return self._info

    @property
    def healthy(self) -> bool:
        return self._ready.is_set()

    @property
    def worker_pid(self) -> int | None:
        """vLLM's own; None for one that somebody else runs."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        if self._supervisor is None:
            self._started = asyncio.get_running_loop().create_future()
            self._supervisor = asyncio.create_task(self._supervise())
        assert self._started is not None
        await asyncio.shield(self._started)

    async def wait_healthy(self, timeout_s: float) -> None:
        """Raises WorkerDied when vLLM is not ready in time."""
        try:
            await asyncio.wait_for(self._ready.wait(), timeout_s)
        except asyncio.TimeoutError:
            raise WorkerDied(f"vLLM is not ready after {timeout_s:g} s; try again later") from None

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Step, None]:
        info = self.info
        if self._closing.is_set():
            raise WorkerDied("the server is shutting down")
        if len(request.prompt_ids) >= info.n_ctx:
            raise PromptTooLong(len(request.prompt_ids), info.n_ctx)
        n_queued = self._n_running - info.n_slots
        if n_queued >= self._max_queued:
            wait = self._mean_s * (n_queued + 1) / info.n_slots
            raise Busy(n_queued, min(60, max(1, round(wait))))
        self._n_running += 1
        began = time.monotonic()
        try:
            while not self.healthy:  # again: it may have died before this task went on
                await self.wait_healthy(self._restart_wait_s)
            async with contextlib.aclosing(self._steps(request)) as steps:
                async for step in steps:
                    yield step
            self._mean_s += 0.1 * (time.monotonic() - began - self._mean_s)
        except WorkerDied:
            if self._closing.is_set():
                raise WorkerDied("the server is shutting down") from None
            raise
        finally:
            self._n_running -= 1

    async def _steps(self, request: GenerateRequest) -> AsyncGenerator[Step, None]:
        """The first and the last one have the usage so far."""
        assert self._client is not None
        n_ctx = self.info.n_ctx
        body = completion_body(request, self._model, n_ctx)
        events = Events(request)
        began, first = time.perf_counter(), 0.0

        def usage() -> Usage:
            now = time.perf_counter()
            prompt_ms, predict_ms = ((first or now) - began) * 1e3, (now - (first or now)) * 1e3
            n_prompt = len(request.prompt_ids)
            return Usage(n_prompt, events.n_cached, events.n_generated, prompt_ms, predict_ms)

        source = self._client.events(body, request, n_ctx)
        try:
            async with contextlib.aclosing(source):
                async for data in source:
                    before = events.n_generated
                    step = events.read(data)
                    if events.n_generated > before:
                        self._recent.append((time.monotonic(), events.n_generated - before))
                    if step is not None:
                        is_first = not first
                        first = first or time.perf_counter()
                        yield replace(step, usage=usage()) if is_first else step
            if events.last is None:
                raise WorkerDied("vLLM ended the answer too early; send the request again")
            yield replace(events.last, usage=usage())
        finally:
            self._add(usage())

    def _add(self, usage: Usage) -> None:
        total = self._total
        self._total = Usage(
            total.n_prompt + usage.n_prompt - usage.n_cached,
            total.n_cached + usage.n_cached,
            total.n_generated + usage.n_generated,
            total.prompt_ms + usage.prompt_ms,
            total.predict_ms + usage.predict_ms,
        )

    async def stats(self) -> BackendStats:
        now, info, total = time.monotonic(), self.info, self._total
        while self._recent and now - self._recent[0][0] > _RATE_SECONDS:
            self._recent.popleft()
        used, size, memory = 0, 0, 0
        if self._client is not None and self.healthy:
            used, size = gauges(await self._client.metrics())
        if self.worker_pid is not None:
            memory = await asyncio.to_thread(resident_bytes, self.worker_pid)
        n_busy = min(self._n_running, info.n_slots)
        return BackendStats(
            n_slots=info.n_slots,
            n_busy=n_busy,
            n_queued=self._n_running - n_busy,
            kv_used=used,
            kv_size=size,
            prompt_tokens_total=total.n_prompt,
            cached_tokens_total=total.n_cached,
            generated_tokens_total=total.n_generated,
            drafted_tokens_total=0,
            accepted_tokens_total=0,
            prompt_seconds_total=total.prompt_ms / 1e3,
            predict_seconds_total=total.predict_ms / 1e3,
            tokens_per_second=sum(n for _, n in self._recent) / _RATE_SECONDS,
            memory_bytes=memory,
            restarts=self._restarts,
        )

    async def close(self) -> None:
        supervisor = self._supervisor
        if supervisor is None:
            return
        self._closing.set()
        if self._client is not None:
            await self._client.close()
        if self._process is not None:
            self._process.hang_up()
        await supervisor

    async def _supervise(self) -> None:
        """One vLLM after another, or the same one for as long as it answers, until `close`."""
        pause = 0.0
        while True:
            began = time.monotonic()
            try:
                reason = await (self._watch_url() if self._settings.url else self._run())
            except Exception as error:  # whatever it is, the next one is needed
                reason = str(error) or type(error).__name__
                if self._first_start(error):
                    return
            if self._first_start(DsqError(reason)) or self._closing.is_set():
                return
            self._restarts += not self._settings.url
            log.warning("%s; %s", reason, "waiting" if self._settings.url else "restarting it")
            # At once after a good run; ever more slowly if it dies right away.
            soon = time.monotonic() - began < 5
            pause = min(max(0.5, 2 * pause), _LONGEST_PAUSE) if soon else 0.0
            await self._closed_within(pause)

    def _first_start(self, error: Exception) -> bool:
        if self._started is None or self._started.done():
            return False
        self._started.set_exception(error)
        return True

    async def _run(self) -> str:
        """Start vLLM and wait until it ends; why it did."""
        settings = self._settings
        with tempfile.TemporaryDirectory(prefix="dsq-vllm-") as folder:  # nobody else may enter
            socket, padded = f"{folder}/socket", Path(folder) / "tokenizer"
            tokenizer = None
            if await asyncio.to_thread(
                write_padded_tokenizer, Path(settings.path), settings.n_vocab, padded
            ):
                tokenizer = str(padded)
            process = self._process = await VllmProcess.start(
                serve_command(settings, socket, tokenizer), environment(settings)
            )
            client = self._client = VllmClient(socket=socket)
            try:
                while not self._closing.is_set() and not await process.ended_within(_LOOK_S):
                    if not self.healthy and await client.alive():
                        await self._is_ready(client)
                        process.loading = False
                    if self.healthy:
                        await process.ended_within(None)
            finally:
                was_loading = process.loading
                self._ready.clear()
                await client.close()
                why = await process.end()
                self._process = None
        where = f"{settings.path}: " if was_loading else ""
        return f"{where}vLLM ended{' while loading' * was_loading}{why}"

    async def _watch_url(self) -> str:
        """Until the vLLM at the URL no longer answers."""
        url = self._settings.url
        client = self._client = self._client or VllmClient(url=url)
        try:
            await self._is_ready(client)
        except InputError as error:
            raise InputError(f"--vllm-url {url}: {error}") from None
        while await client.alive():
            if await self._closed_within(_WATCH_S):
                break
        self._ready.clear()
        return f"the vLLM at {url} does not answer"

    async def _is_ready(self, client: VllmClient) -> None:
        settings = self._settings
        self._model, n_ctx = await client.model()
        self._info = ModelInfo(
            path=settings.path,
            n_ctx=min(n_ctx, settings.n_ctx or n_ctx),
            n_ctx_train=settings.n_ctx_train,
            n_vocab=settings.n_vocab,
            n_slots=settings.n_parallel,
            n_parameters=settings.n_parameters,
            size_bytes=settings.size_bytes,
            kv_type="auto",
        )
        self._ready.set()
        if self._started is not None and not self._started.done():
            self._started.set_result(None)

    async def _closed_within(self, seconds: float) -> bool:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._closing.wait(), seconds)
        return self._closing.is_set()
