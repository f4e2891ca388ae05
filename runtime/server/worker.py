"""The worker: a process of its own that holds the model, `python -m dsq.runtime.server.worker`.

A crash of llama.cpp then ends this process and not the server. Frames come in through stdin and go
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

from dsq.errors import DsqError, InputError
from dsq.runtime.server.frames import FrameBuffer, Message, pack, pack_steps, read_request
from dsq.runtime.server.llama_batch import LlamaSettings
from dsq.runtime.server.loop import Loop


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
    def __init__(self, loop: Loop, inbox: _Inbox, out: int) -> None:
        self._loop, self._inbox, self._out = loop, inbox, out
        self._memory = (0.0, 0)  # when it was read, bytes

    def run(self) -> None:
        """Until the server closes the pipe."""
        while True:
            for message, ids in self._inbox.take(wait=self._loop.idle):
                self._handle(message, ids)
            if self._inbox.ended:
                return
            if not self._loop.idle:
                steps = self._loop.step()
                _write(self._out, pack_steps(steps, self._stats()))

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
    out = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints must not get among the frames
    inbox = _Inbox(0)
    frames = inbox.take(wait=True)
    while not frames and not inbox.ended:
        frames = inbox.take(wait=True)
    if not frames:
        return
    try:
        loop = Loop(LlamaSettings(**frames[0][0]["settings"]))
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
