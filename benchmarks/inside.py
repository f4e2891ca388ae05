"""Where the time of one conversion goes: `python -m benchmarks.inside CHECKPOINT TYPE OUT`.

Runs the conversion in this process with three functions wrapped, and prints JSON: seconds of wall
time, of CPU time, and of thread time in each. A wrapped call takes a microsecond more; a chunk
takes milliseconds.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.pipeline import plan_gguf, run_gguf_plan
from dsq.quant import ggml, stream
from dsq.quant.presets import preset
from dsq.quant.threads import default_threads


class ThreadTimes:
    """CPU seconds of all threads in each wrapped function."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    def wrap(self, owner: Any, function: str, key: str) -> None:
        inner: Callable[..., Any] = getattr(owner, function)
        self.seconds[key] = 0.0

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return inner(*args, **kwargs)
            finally:
                spent = time.thread_time() - start
                with self._lock:
                    self.seconds[key] += spent

        setattr(owner, function, timed)


def main(source: str, kind: str, out: str) -> None:
    times = ThreadTimes()
    times.wrap(ggml, "quantize_into", "quantize")
    times.wrap(ggml, "dequantize_into", "to_float")
    times.wrap(stream, "_largest", "finite")
    start, cpu = time.perf_counter(), time.process_time()
    checkpoint = open_checkpoint(source)
    run_gguf_plan(checkpoint, plan_gguf(checkpoint, preset(kind)), Path(out), force=True)
    report = {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "cores": default_threads(),
        **times.seconds,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
