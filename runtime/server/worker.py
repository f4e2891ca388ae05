"""The worker: a process of its own that holds the model, `python -m dsq.runtime.server.worker`.

A crash of the engine then ends this process and not the server. Frames come in through stdin and go
out through the pipe that was stdout. When the server dies, stdin ends, and so does the worker.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dsq.errors import DsqError, InputError
from dsq.runtime.server.backend import GenerateRequest, ModelInfo, Step
from dsq.runtime.server.frames import FrameBuffer, Message, pack, pack_steps, read_request

if TYPE_CHECKING:
    from dsq.runtime.server.loop import Counters


_TELL_S = 0.1


class WorkerLoop(Protocol):
    """What runs in a worker: requests in, steps out; see `Loop` and `ExllamaLoop`."""

    counters: Counters

    @property
    def info(self) -> ModelInfo: ...
    @property
    def idle(self) -> bool: ...
    @property
    def n_running(self) -> int: ...
    @property
    def n_waiting(self) -> int: ...
    @property
    def kv_used(self) -> int: ...
    @property
    def kv_size(self) -> int: ...
    def submit(self, id: int, request: GenerateRequest) -> None: ...
    def cancel(self, id: int) -> None: ...
    def step(self) -> list[tuple[int, Step | DsqError]]: ...
    def close(self) -> None: ...


def open_loop(engine: str, settings: Message) -> WorkerLoop:
    """Load the model. An engine's libraries are imported only here."""
    if engine == "torch":
        from dsq.runtime.server.torch_batch import TorchSettings, torch_loop

        return torch_loop(TorchSettings(**settings))
    if engine == "exllamav2":
        from dsq.runtime.server.exllama_backend import ExllamaLoop, ExllamaSettings

        return ExllamaLoop(ExllamaSettings(**settings))
    from dsq.runtime.server.llama_batch import LlamaSettings
    from dsq.runtime.server.loop import Loop

    return Loop(LlamaSettings(**settings))


class _Inbox:
    """Frames from stdin."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = FrameBuffer()
        self.ended = False

    def take(self, wait: bool) -> list[tuple[Message, list[int]]]:
        """What has come; with `wait` at least one read."""
        frames: list[tuple[Message, list[int]]] = []
        while not self.ended and select.select([self._fd], [], [], None if wait else 0)[0]:
            data = os.read(self._fd, 1 << 20)
            self.ended = not data
            frames += self._buffer.feed(data)
            wait = False
        return frames


class _Worker:
    def __init__(self, loop: WorkerLoop, inbox: _Inbox, out: int) -> None:
        self._loop, self._inbox, self._out = loop, inbox, out
        self._memory = (0.0, 0)  # when it was read, bytes
        self._told = 0.0  # when the stats were sent

    def run(self) -> None:
        """Until the server closes the pipe."""
        while True:
            for message, ids in self._inbox.take(wait=self._loop.idle):
                self._handle(message, ids)
            if self._inbox.ended:
                return
            if not self._loop.idle:
                steps = self._loop.step()
                _write(self._out, pack_steps(steps, self._news(steps)))

    def _handle(self, message: Message, ids: list[int]) -> None:
        id: int = message["id"]
        if message["op"] == "submit":
            try:
                self._loop.submit(id, read_request(message, ids))
            except Exception as error:  # one request's fault must not end the others
                known = error if isinstance(error, DsqError) else DsqError(repr(error))
                _write(self._out, pack_steps([(id, known)], self._stats()))
        elif message["op"] == "cancel":
            self._loop.cancel(id)
            _write(self._out, pack_steps([], self._stats()))

    def _news(self, steps: list[tuple[int, Step | DsqError]]) -> Message | None:
        """The stats when a request begins or ends, else now and then: a step's frame is small."""
        now = time.monotonic()
        notable = any(isinstance(s, DsqError) or s.usage is not None for _, s in steps)
        if not notable and now - self._told < _TELL_S:
            return None
        self._told = now
        return self._stats()

    def _stats(self) -> Message:
        loop, now = self._loop, time.monotonic()
        if now - self._memory[0] > 1:
            self._memory = (now, _resident_bytes())
        return {
            "n_busy": loop.n_running,
            "n_queued": loop.n_waiting,
            "kv_used": loop.kv_used,
            "kv_size": loop.kv_size,
            "memory_bytes": self._memory[1],
            "counters": vars(loop.counters),
        }


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no /proc: the peak must do
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def main() -> None:
    # The server decides when this process ends, also when a signal goes to the whole group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Before ggml is loaded: on an abort it would have gdb look at the process for seconds.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    out = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints must not get among the frames
    inbox = _Inbox(0)
    frames = inbox.take(wait=True)
    while not frames and not inbox.ended:
        frames = inbox.take(wait=True)
    if not frames:
        return
    first = frames[0][0]
    try:
        loop = open_loop(first["engine"], first["settings"])
    except DsqError as error:
        failed = {"op": "failed", "text": str(error), "input": isinstance(error, InputError)}
        _write(out, pack(failed))
        return
    try:
        _write(out, pack({"op": "ready", "info": asdict(loop.info)}))
        _Worker(loop, inbox, out).run()
    except BrokenPipeError:
        pass  # the server is gone
    finally:
        loop.close()


if __name__ == "__main__":
    main()
    sys.exit(0)
