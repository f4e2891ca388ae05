"""What happens to llama.cpp when its threads have to share cores: why dsq asks for fewer.

Alone: `python -m benchmarks.oversubscription` on a machine that does nothing else.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.peers import SMOLLM2_GGUF
from benchmarks.results import Section, table
from benchmarks.settings import Settings
from dsq.quant.threads import default_threads

TOKENS = 64
SECONDS = 5.0  # a case that collapses is cut off here


def benchmark(settings: Settings) -> Section:
    cores = default_threads()
    cases = [(n, 0) for n in sorted({1, cores, 2 * cores, 4 * cores})]
    # With one core taken by others: all cores, and the one fewer that free_cores asks for.
    cases += [(n, 1) for n in sorted({max(1, cores - 1), cores}, reverse=True)]
    rows = []
    for n_threads, n_others in cases:
        with competitors(n_others):
            speeds = [
                tokens_per_second(SMOLLM2_GGUF, n_threads, 8 if settings.quick else TOKENS)
                for _ in range(1 if settings.quick else settings.repeat)
            ]
        low, high = min(speeds), max(speeds)
        rows.append([str(n_threads), str(n_others), f"{low:.1f} to {high:.1f}"])
    body = (
        f"SmolLM2-135M q4_1, greedy, one sequence, {cores} cores. Others: processes that keep a "
        f"core busy. A run is {TOKENS} tokens, or as many as {SECONDS:g} seconds give.\n\n"
        + table(["threads", "others", "tokens/s"], rows)
    )
    return Section("oversubscription", "Threads that share cores", body)


@contextlib.contextmanager
def competitors(n: int) -> Iterator[None]:
    """`n` processes that compute and do nothing else."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def tokens_per_second(model: Path, n_threads: int, n_tokens: int) -> float:
    from dsq.runtime.llamacpp import LlamaCppEngine

    with LlamaCppEngine(model, n_ctx=256, n_threads=n_threads) as engine:
        token = int(engine.eval([1, 2, 3]).argmax())
        start = time.perf_counter()
        done = 0
        while done < n_tokens and time.perf_counter() - start < SECONDS:
            token = int(engine.eval([token]).argmax())
            done += 1
        return done / (time.perf_counter() - start)


if __name__ == "__main__":
    alone = Settings(
        Path(), repeat=3, quick="--quick" in sys.argv, text=Path(), chunks=0, threads=0
    )
    print(benchmark(alone).body)
