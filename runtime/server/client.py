"""WorkerBackend: the Backend over a worker process, which it starts, watches and restarts."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeAlias

from dsq.errors import DsqError, InputError
from dsq.quant.threads import free_cores
from dsq.runtime.server.backend import (
    BackendStats,
    Busy,
    GenerateRequest,
    ModelInfo,
    PromptTooLong,
    Step,
    WorkerDied,
)
from dsq.runtime.server.frames import (
    HEADER,
    Message,
    body_bytes,
    pack,
    pack_request,
    read_steps,
    unpack,
)

if TYPE_CHECKING:
    from dsq.runtime.server.exllama_backend import ExllamaSettings
    from dsq.runtime.server.llama_batch import LlamaSettings
    from dsq.runtime.server.torch_batch import TorchSettings

    WorkerSettings: TypeAlias = LlamaSettings | TorchSettings | ExllamaSettings

_RATE_SECONDS = 10.0
_PATIENCE_S = 5.0  # for a worker to end by itself
_LONGEST_PAUSE = 30.0  # between attempts to restart a worker that cannot start

log = logging.getLogger("dsq.server")
_COUNTERS = (
    "prompt_tokens",
    "cached_tokens",
    "generated_tokens",
    "drafted_tokens",
    "accepted_tokens",
    "prompt_seconds",
    "predict_seconds",
    "outside_seconds",
)


class _Call:
    """One request's way back: what has come and was not taken yet is one step, however slow the
    reader. So a reader that stops costs no more than its own answer's tokens."""

    def __init__(self) -> None:
        self._step: Step | None = None
        self._error: DsqError | None = None
        self._changed = asyncio.Event()
        self.process: asyncio.subprocess.Process | None = None  # where it runs

    def put(self, outcome: Step | DsqError) -> None:
        if isinstance(outcome, DsqError):
            self._error = outcome
        else:
            self._step = outcome if self._step is None else _join(self._step, outcome)
        self._changed.set()

    async def next(self) -> Step:
        """Tokens that came before an error are given out first."""
        while True:
            if self._step is not None:
                step, self._step = self._step, None
                return step
            if self._error is not None:
                raise self._error
            self._changed.clear()
            await self._changed.wait()


def _join(a: Step, b: Step) -> Step:
    chosen = None
    if a.logprobs is not None and b.logprobs is not None:
        chosen = a.logprobs + b.logprobs
    prompt = a.prompt_logprobs if a.prompt_logprobs is not None else b.prompt_logprobs
    return Step(a.token_ids + b.token_ids, chosen, prompt, b.finish, b.usage or a.usage)


def _environment(n_threads: int | None) -> dict[str, str] | None:
    """The worker's environment; None: the server's own.

    llama-cpp-python's libggml-cpu is built with OpenMP (libgomp), whose threads spin where they
    meet. Two threads on two cores that others used too gave 0.1 to 3 tokens a second (SmolLM2),
    22 with PASSIVE, which waits in the kernel, and one thread gave 28 to 30. So with no number
    given the worker takes the cores that are free (`free_cores`) and spins; who asks for more than
    that gets threads that do not spin. What others do later is not watched.
    """
    if n_threads is None or n_threads <= free_cores() or "OMP_WAIT_POLICY" in os.environ:
        return None
    return {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}


class WorkerBackend:
    """See `dsq.runtime.server.backend.Backend`.

    At most `max_queued` requests wait beyond those that run; more get Busy. A request that comes
    while the worker restarts waits up to `restart_wait_s` for it.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        engine: str = "llama.cpp",
        *,
        max_queued: int = 64,
        restart_wait_s: float = 30.0,
    ) -> None:
        self._settings, self._engine = settings, engine
        self._max_queued, self._restart_wait_s = max_queued, restart_wait_s
        self._info: ModelInfo | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._ready, self._closing = asyncio.Event(), asyncio.Event()
        self._started: asyncio.Future[None] | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._calls: dict[int, _Call] = {}
        self._ids = itertools.count(1)
        self._restarts = 0
        self._last: Message = {}
        self._before = dict.fromkeys(_COUNTERS, 0.0)  # of workers that are gone
        self._recent: deque[tuple[float, int]] = deque()
        self._mean_s = 1.0  # how long a request takes

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
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        if self._supervisor is None:
            self._started = asyncio.get_running_loop().create_future()
            self._supervisor = asyncio.create_task(self._supervise())
        assert self._started is not None
        await asyncio.shield(self._started)

    async def wait_healthy(self, timeout_s: float) -> None:
        """Raises WorkerDied when no worker is ready in time."""
        try:
            await asyncio.wait_for(self._ready.wait(), timeout_s)
        except asyncio.TimeoutError:
            raise WorkerDied(
                f"the worker process is not ready after {timeout_s:g} s; try again later"
            ) from None

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Step, None]:
        info = self.info
        if self._closing.is_set():
            raise WorkerDied("the server is shutting down")
        if len(request.prompt_ids) >= info.n_ctx:
            raise PromptTooLong(len(request.prompt_ids), info.n_ctx)
        n_queued = len(self._calls) - info.n_slots
        if n_queued >= self._max_queued:
            wait = self._mean_s * (n_queued + 1) / info.n_slots
            raise Busy(n_queued, min(60, max(1, round(wait))))
        id, call = next(self._ids), _Call()
        self._calls[id] = call
        began, finished = time.monotonic(), False
        try:
            while not self.healthy:  # again: it may have died before this task went on
                await self.wait_healthy(self._restart_wait_s)
            await self._send(call, pack_request(id, request))
            while not finished:
                step = await call.next()
                finished = step.finish is not None
                yield step
            self._mean_s += 0.1 * (time.monotonic() - began - self._mean_s)
        finally:
            del self._calls[id]
            if not finished and call.process is not None and call.process is self._process:
                self._write(pack({"op": "cancel", "id": id}))

    async def stats(self) -> BackendStats:
        now, last = time.monotonic(), self._last
        while self._recent and now - self._recent[0][0] > _RATE_SECONDS:
            self._recent.popleft()
        counters = last.get("counters", {})
        total = {name: self._before[name] + counters.get(name, 0) for name in _COUNTERS}
        n_busy = min(len(self._calls), self.info.n_slots)
        return BackendStats(
            n_slots=self.info.n_slots,
            n_busy=last.get("n_busy", 0),
            n_queued=len(self._calls) - n_busy,
            kv_used=last.get("kv_used", 0),
            kv_size=last.get("kv_size", 0),
            prompt_tokens_total=int(total["prompt_tokens"]),
            cached_tokens_total=int(total["cached_tokens"]),
            generated_tokens_total=int(total["generated_tokens"]),
            drafted_tokens_total=int(total["drafted_tokens"]),
            accepted_tokens_total=int(total["accepted_tokens"]),
            prompt_seconds_total=total["prompt_seconds"],
            predict_seconds_total=total["predict_seconds"],
            outside_seconds_total=total["outside_seconds"],
            tokens_per_second=sum(n for _, n in self._recent) / _RATE_SECONDS,
            memory_bytes=last.get("memory_bytes", 0),
            restarts=self._restarts,
        )

    async def close(self) -> None:
        supervisor = self._supervisor
        if supervisor is None or self._closing.is_set():
            return
        self._closing.set()
        self._fail_calls("the server is shutting down")
        self._hang_up()
        await asyncio.wait({supervisor}, timeout=_PATIENCE_S)
        if self._process is not None:  # it loads a large model, or hangs
            self._process.kill()
        await supervisor

    async def _send(self, call: _Call, frame: bytes) -> None:
        call.process = self._process
        self._write(frame)
        process = self._process
        if process is not None and process.stdin is not None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                await process.stdin.drain()  # a dead worker: the supervisor tells every call

    def _write(self, frame: bytes) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(frame)

    async def _supervise(self) -> None:
        """One worker after another, until `close`."""
        pause = 0.0
        while True:
            began = time.monotonic()
            try:
                await self._run_worker()
                reason = "the worker process ended"
            except Exception as error:  # whatever it is, the next worker is needed
                reason = str(error) or type(error).__name__
                if isinstance(error, DsqError) and self._first_start(error):
                    await self._end_process()
                    return
            code = await self._end_process()
            if code is not None and code < 0:
                reason += f" (killed by {signal.Signals(-code).name})"
            elif code:
                reason += f" (exit code {code})"
            died = DsqError(f"{self._settings.path}: {reason} while loading")
            if self._first_start(died) or self._closing.is_set():
                return
            self._restarts += 1
            for name in _COUNTERS:
                self._before[name] += self._last.get("counters", {}).get(name, 0)
            self._last = {}
            log.warning("%s: %s; it is being restarted", self._settings.path, reason)
            self._fail_calls(f"{reason}; it is being restarted: send the request again")
            # At once after a good run; ever more slowly if it dies right away.
            soon = time.monotonic() - began < 5
            pause = min(max(0.5, 2 * pause), _LONGEST_PAUSE) if soon else 0.0
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._closing.wait(), pause)

    def _first_start(self, error: DsqError) -> bool:
        if self._started is None or self._started.done():
            return False
        self._started.set_exception(error)
        return True

    async def _run_worker(self) -> None:
        """Start a worker and hand out what it sends, until it ends. DsqError: it cannot load."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "dsq.runtime.server.worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=_environment(self._settings.n_threads),
        )
        self._process = process
        if self._closing.is_set():
            return
        assert process.stdout is not None
        self._write(pack({"engine": self._engine, "settings": asdict(self._settings)}))
        try:
            while True:
                n_text, total = body_bytes(await process.stdout.readexactly(HEADER.size))
                self._receive(*unpack(await process.stdout.readexactly(total), n_text))
        except asyncio.IncompleteReadError:
            pass
        finally:
            self._ready.clear()

    def _receive(self, message: Message, ids: list[int]) -> None:
        if message["op"] == "steps":
            self._last = message.get("stats", self._last)
            if ids:
                self._recent.append((time.monotonic(), len(ids)))
            for id, outcome in read_steps(message, ids):
                if id in self._calls:
                    self._calls[id].put(outcome)
        elif message["op"] == "ready":
            self._info = ModelInfo(**message["info"])
            self._ready.set()
            if self._started is not None and not self._started.done():
                self._started.set_result(None)
        else:
            raise (InputError if message["input"] else DsqError)(message["text"])

    def _fail_calls(self, reason: str) -> None:
        for call in self._calls.values():
            if call.process is not None or self._closing.is_set():
                call.put(WorkerDied(reason))

    def _hang_up(self) -> None:
        """Close the worker's stdin, which ends it."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    async def _end_process(self) -> int | None:
        """Let the worker end, or kill it if that takes long; its exit code."""
        process = self._process
        self._ready.clear()
        if process is None:
            return None
        self._hang_up()
        try:
            code = await asyncio.wait_for(process.wait(), _PATIENCE_S)
        except asyncio.TimeoutError:
            process.kill()
            code = await process.wait()
        self._process = None
        return code
