"""`make soak`: 64 clients against `dsq serve`, with cancels, bad bodies and killed workers.

Each client has a marker of its own, and every answer must be that client's. At the end: were all
requests answered or refused as they should be, are all slots free, how long did a killed worker
take to come back, and is the memory flat over 2,000 further requests.

    python -m scripts.soak --minutes 10
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.runtime.server.real_server import chat_coder, served

N_CLIENTS = 64
SLOTS, CTX, QUEUE = 4, 512, 40
KILL_EVERY_S = 40.0
MOST_RESTART_S = 5.0  # and what a start of the server takes, which loads the model, too
N_FLAT = 2000
FLAT = 0.02
BAD = (b"{", b"[]", b'{"prompt": 1}', b'{"prompt": "x", "temperature": "hot"}', b"\xff")


@dataclass
class Tally:
    """What has happened. `wrong` must stay empty."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    restarts_s: list[float] = field(default_factory=list)

    def fault(self, what: str) -> None:
        self.outcomes["wrong"] += 1
        if len(self.wrong) < 20:
            self.wrong.append(what)


class Client:
    """One of the 64: sends one request after another, and knows what may come back."""

    def __init__(self, number: int, url: str, tally: Tally, *, cancels: bool) -> None:
        self.marker = f"marker-{number:02d}-{random.Random(number).randrange(10**6):06d}"
        self._url, self._tally, self._cancels = url, tally, cancels
        self._rng = random.Random(1000 + number)

    async def run(self, end: float, most: int | None = None) -> None:
        limits = httpx.Limits(max_keepalive_connections=1)
        async with httpx.AsyncClient(base_url=self._url, timeout=90, limits=limits) as http:
            n = 0
            while time.monotonic() < end and (most is None or n < most):
                n += 1
                try:
                    await self._one(http)
                except httpx.HTTPError as error:
                    self._tally.fault(f"{self.marker}: {type(error).__name__} {error}")

    async def _one(self, http: httpx.AsyncClient) -> None:
        draw = self._rng.random()
        if draw < 0.05:
            answer = await http.post("/completion", content=self._rng.choice(BAD))
            self._expect(answer.status_code == 400, "bad body refused", answer.text)
        elif draw < 0.15:
            await self._tokenize(http)
        elif draw < 0.40:
            await self._whole(http)
        else:
            await self._stream(http)

    async def _tokenize(self, http: httpx.AsyncClient) -> None:
        text = f"{self.marker} {self._rng.random()} é"
        ids = (await http.post("/tokenize", json={"content": text})).json()["tokens"]
        back = (await http.post("/detokenize", json={"tokens": ids})).json()["content"]
        self._expect(back == text, "tokenized and back", back)

    async def _whole(self, http: httpx.AsyncClient) -> None:
        """Its own prompt must stand before the answer."""
        prompt = f"# {self.marker} {self._rng.randrange(9)}\n" * self._rng.randrange(1, 12)
        sent = {"prompt": prompt, "echo": True, "max_tokens": self._rng.randrange(1, 24)}
        answer = await http.post("/v1/completions", json=sent)
        if answer.status_code == 200:
            text = answer.json()["choices"][0]["text"]
            self._expect(text.startswith(prompt), "whole", text[:80])
        else:
            await self._refused(answer.status_code, answer.headers, answer.json())

    async def _stream(self, http: httpx.AsyncClient) -> None:
        """A grammar lets the marker through alone, so every answer that is not it is another's."""
        body = {
            "messages": [{"role": "user", "content": self.marker * self._rng.randrange(1, 6)}],
            "grammar": f'root ::= "{self.marker}"',
            "stream": True,
            "temperature": self._rng.choice((0.0, 1.0)),
        }
        cut = self._cancels and self._rng.random() < 0.3
        leave_after = self._rng.randrange(0, 6) if cut else None
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                await self._refused(answer.status_code, answer.headers, answer.json())
                return
            text, n, done = "", 0, False
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    done = True
                    break
                event = json.loads(line[6:])
                if "error" in event:
                    await self._refused(503, answer.headers, event)
                    return
                text += event["choices"][0]["delta"].get("content") or ""
                n += 1
                if leave_after is not None and n > leave_after:
                    self._expect(self.marker.startswith(text), "cancelled", text)
                    return
        self._expect(done and text == self.marker, "streamed", f"{text!r}, done: {done}")

    async def _refused(self, status: int, headers: httpx.Headers, body: Any) -> None:
        message = str(body.get("error", {}).get("message"))
        if status == 429 and int(headers.get("retry-after", 0)) > 0:
            self._tally.outcomes["refused, 429 with Retry-After"] += 1
            await asyncio.sleep(0.05)
        elif status == 503 and body["error"]["code"] == "worker_died":
            self._tally.outcomes["told that the worker died"] += 1
        else:
            self._tally.fault(f"{self.marker}: {status} {message}")

    def _expect(self, true: bool, what: str, got: str) -> None:
        if true:
            self._tally.outcomes[what] += 1
        else:
            self._tally.fault(f"{self.marker}: {what}: {got[:200]}")


def worker_of(pid: int) -> int | None:
    """The process that runs the model."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        try:
            if b"dsq.runtime.server.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
        except OSError:
            continue
    return None


async def kill_workers(pid: int, url: str, tally: Tally, end: float, every: float) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=30) as http:
        while time.monotonic() + every < end:
            await asyncio.sleep(every)
            worker = worker_of(pid)
            if worker is None:
                tally.fault("there is no worker to kill")
                return
            os.kill(worker, signal.SIGKILL)
            began = time.monotonic()
            while worker_of(pid) in (None, worker) or not await _healthy(http):
                if time.monotonic() - began > 60:
                    tally.fault("no worker came back within 60 s")
                    return
                await asyncio.sleep(0.02)
            tally.restarts_s.append(time.monotonic() - began)


async def _healthy(http: httpx.AsyncClient) -> bool:
    return (await http.get("/health")).status_code == 200


def resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has no memory")


async def soak(pid: int, url: str, seconds: float, tally: Tally) -> None:
    end = time.monotonic() + seconds
    every = min(KILL_EVERY_S, seconds / 3)
    clients = [Client(i, url, tally, cancels=True) for i in range(N_CLIENTS)]
    await asyncio.gather(
        kill_workers(pid, url, tally, end, every), *(client.run(end) for client in clients)
    )


async def flat_memory(
    pid: int, url: str, tally: Tally, n_flat: int
) -> list[tuple[str, float, float]]:
    """MiB of both processes before and after `n_flat` mixed requests; 16 clients, with cancels."""

    async def some(n: int) -> None:
        clients = [Client(i, url, tally, cancels=True) for i in range(16)]
        await asyncio.gather(*(client.run(time.monotonic() + 600, n // 16) for client in clients))

    await some(n_flat // 4)  # pools and caches have their size then
    worker = worker_of(pid)
    assert worker is not None
    processes = {"HTTP process": pid, "worker": worker}
    before = {name: resident_mib(p) for name, p in processes.items()}
    await some(n_flat)
    return [(name, before[name], resident_mib(p)) for name, p in processes.items()]


async def all_free(url: str) -> str:
    """Empty when nothing runs or waits any more; else what does."""
    async with httpx.AsyncClient(base_url=url, timeout=30) as http:
        for _ in range(100):
            model = (await http.get("/stats")).json()["models"][0]
            if not model["n_busy"] and not model["n_queued"]:
                return ""
            await asyncio.sleep(0.1)
        return f"{model['n_busy']} busy and {model['n_queued']} waiting after 10 s"


def report(
    tally: Tally,
    seconds: float,
    started_s: float,
    leak: str,
    memory: list[tuple[str, float, float]],
    n_flat: int,
) -> tuple[str, bool]:
    """The lines to print, and whether all is well."""
    lines = [f"soak: {N_CLIENTS} clients, {SLOTS} slots, a queue of {QUEUE}, {seconds:.0f} s"]
    lines += [f"  {n:7,}  {what}" for what, n in tally.outcomes.most_common()]
    most = MOST_RESTART_S + started_s
    slowest = max(tally.restarts_s, default=0.0)
    lines.append(
        f"  worker killed {len(tally.restarts_s)} times; back and healthy after "
        f"{slowest:.1f} s at most (goal {most:.1f} s: {MOST_RESTART_S:g} s and one start)"
    )
    lines.append(f"  slots: {leak or 'all free at the end'}")
    well = not tally.wrong and not leak and slowest <= most
    for name, before, after in memory:
        change = after / before - 1
        well = well and abs(change) <= FLAT
        lines.append(
            f"  {name}: {before:.1f} MiB, after {n_flat:,} requests {after:.1f} MiB "
            f"({change:+.1%}, goal ±{FLAT:.0%})"
        )
    lines += [f"  WRONG {what}" for what in tally.wrong]
    lines.append("  all is well" if well else "  NOT well")
    return "\n".join(lines), well


def say(text: str) -> None:
    print(f"soak: {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--flat", type=int, default=N_FLAT, help="requests of the memory's part")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, log = chat_coder(Path(folder)), Path(folder) / "server.log"
        options = ("-c", str(CTX), "--kv-size", str(2 * CTX), "--parallel", str(SLOTS))
        started = time.monotonic()
        with served(str(model), *options, "--queue", str(QUEUE), log=log) as (process, url):
            tally, began = Tally(), time.monotonic()
            started_s = began - started
            asyncio.run(soak(process.pid, url, 60 * args.minutes, tally))
            seconds = time.monotonic() - began
            n = tally.outcomes.total()
            say(f"{n:,} requests in {seconds:.0f} s; now {args.flat:,} for the memory")
            leak = asyncio.run(all_free(url))
            memory = asyncio.run(flat_memory(process.pid, url, tally, args.flat))
            leak = leak or asyncio.run(all_free(url))
        text, well = report(tally, seconds, started_s, leak, memory, args.flat)
        print(text)
        if not well:
            print("the end of the server's log:\n" + log.read_text()[-3000:])
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
