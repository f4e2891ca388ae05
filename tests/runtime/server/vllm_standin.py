"""What speaks vLLM's HTTP interface, with a model of one matrix: for tests without vLLM.

In a thread (`standing_in`), or as the `vllm` command (`python vllm_standin.py serve DIR --uds …`).
What it refuses and the shape of what it sends are vLLM 0.32's; `make test-vllm` compares them with
the real one. It imports nothing of dsq.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

N_VOCAB = 292
NAME = "dsq"


def logits_after(tokens: list[int]) -> list[float]:
    """The model: the last token and how many there are decide."""
    rng = random.Random(1000 * tokens[-1] + len(tokens))
    return [rng.gauss(0, 2) for _ in range(N_VOCAB)]


def logprobs_of(logits: list[float]) -> list[float]:
    top = max(logits)
    total = top + math.log(sum(math.exp(x - top) for x in logits))
    return [x - total for x in logits]


class StandIn:
    """`refuse`: (status, content) for the next requests. `cut_at`: the connection is lost before
    that token. `hold_at`: answers wait before that token until `go` is set."""

    def __init__(self, n_ctx: int = 100, max_logprobs: int = 64) -> None:
        self.n_ctx, self.max_logprobs = n_ctx, max_logprobs
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.refuse: tuple[int, Any] | None = None
        self.cut_at: int | None = None
        self.fail_at: int | None = None  # an error comes instead of that token
        self.quit_at: int | None = None  # the stream ends before that token as if all were said
        self.hold_at: int | None = None
        self.go = threading.Event()
        self.n_running = self.n_cancelled = 0
        self.health = 200
        self.text = "x"  # what it says the tokens are
        self.app = Starlette(
            routes=[
                Route("/health", lambda _: Response(status_code=self.health)),
                Route("/v1/models", self._models),
                Route("/metrics", self._metrics),
                Route("/v1/completions", self._completions, methods=["POST"]),
            ]
        )

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": NAME, "max_model_len": self.n_ctx}]})

    async def _metrics(self, request: Request) -> Response:
        return PlainTextResponse(
            'vllm:cache_config_info{block_size="16",num_gpu_blocks="50"} 1.0\n'
            'vllm:kv_cache_usage_perc{engine="0"} 0.25\n'
        )

    async def _completions(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if self.refuse is not None:
            status, content = self.refuse
            if isinstance(content, str):
                return PlainTextResponse(content, status)
            return JSONResponse(content, status)
        wrong = self._wrong(body)
        if wrong:
            error = {"message": wrong, "type": "BadRequestError", "param": None, "code": 400}
            return JSONResponse({"error": error}, 400)
        return StreamingResponse(self._stream(body), media_type="text/event-stream")

    def _wrong(self, body: dict[str, Any]) -> str | None:
        """vLLM's checks."""
        n = len(body["prompt"])
        if n >= self.n_ctx:
            return (
                f"This model's maximum context length is {self.n_ctx} tokens. However, your "
                f"prompt contains {n} tokens"
            )
        for name, low, high in (
            *(("temperature", 0, 2), ("top_p", 1e-9, 1), ("min_p", 0, 1), ("top_k", -1, 2**31)),
            *(("presence_penalty", -2, 2), ("frequency_penalty", -2, 2)),
        ):
            if not low <= body[name] <= high:
                return f"{name} must be in [{low}, {high}], got {body[name]}."
        if body.get("logprobs", 0) > self.max_logprobs:
            return f"Requested sample logprobs of {body['logprobs']}, which is too many"
        if not all(isinstance(key, str) for key in body.get("logit_bias", {})):
            return "logit_bias"
        return None

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        self.n_running += 1
        ended = False
        prompt, tokens = list(body["prompt"]), list(body["prompt"])
        bias = {int(key): value for key, value in body.get("logit_bias", {}).items()}
        try:
            most = min(body["max_tokens"], self.n_ctx - len(prompt))
            for n in range(most):
                while n == self.hold_at and not self.go.is_set():
                    await asyncio.sleep(0.002)
                if n == self.cut_at:
                    raise ConnectionResetError("the test wants it")
                if n == self.fail_at:
                    yield _event({"error": {"message": "EngineCore died", "code": 500}})
                    break
                if n == self.quit_at:
                    break
                logits = logits_after(tokens)
                biased = [x + bias.get(i, 0.0) for i, x in enumerate(logits)]
                chosen = biased.index(max(biased))
                tokens.append(chosen)
                stop = chosen in body["stop_token_ids"]
                finish = "stop" if stop else "length" if n + 1 == most else None
                yield _event(self._chunk(body, tokens, len(prompt), n, finish))
                await asyncio.sleep(0)
                if finish:
                    break
            if body["stream_options"]["include_usage"]:
                n_new = len(tokens) - len(prompt)
                usage = {
                    "prompt_tokens": len(prompt),
                    "total_tokens": len(tokens),
                    "completion_tokens": n_new,
                    "prompt_tokens_details": {"cached_tokens": 7},
                }
                yield _event({**_HEAD, "choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"
            ended = True
        finally:
            self.n_running -= 1
            self.n_cancelled += not ended

    def _chunk(
        self, body: dict[str, Any], tokens: list[int], n_prompt: int, n: int, finish: str | None
    ) -> dict[str, Any]:
        echo = n == 0 and body.get("echo")
        logprobs = None
        if body.get("logprobs") is not None:
            logprobs = _shown_logprobs(tokens, 0 if echo else len(tokens) - 1, body["logprobs"])
        return {
            **_HEAD,
            "choices": [
                {
                    "index": 0,
                    "text": self.text,
                    "logprobs": logprobs,
                    "finish_reason": finish,
                    "stop_reason": tokens[-1] if finish == "stop" else None,
                    "prompt_token_ids": tokens[:n_prompt] if n == 0 else None,
                    "token_ids": tokens[-1:],
                }
            ],
        }


_HEAD = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": NAME}


def _shown_logprobs(tokens: list[int], start: int, n: int) -> dict[str, Any]:
    """From the token at `start`; the chosen one comes first, then the n best."""
    chosen: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for at in range(start, len(tokens)):
        if at == 0:
            chosen.append(None)
            tops.append(None)
            continue
        values = logprobs_of(logits_after(tokens[:at]))
        best = sorted(range(N_VOCAB), key=lambda i: -values[i])[:n]
        chosen.append(values[tokens[at]])
        tops.append({f"token_id:{i}": values[i] for i in (tokens[at], *best)})
    names = [f"token_id:{i}" for i in tokens[start:]]
    offsets = list(range(len(names)))
    return {
        "text_offset": offsets,
        "token_logprobs": chosen,
        "tokens": names,
        "top_logprobs": tops,
    }


def _event(content: dict[str, Any]) -> bytes:
    """As pydantic writes it: characters beyond ASCII stand for themselves."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


@contextmanager
def standing_in(made: StandIn) -> Iterator[str]:
    """Its URL."""
    config = uvicorn.Config(made.app, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as where:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[where])))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.002)
            yield f"http://127.0.0.1:{where.getsockname()[1]}"
        finally:
            server.should_exit = True
            made.go.set()
            thread.join()


def main() -> None:
    """`vllm serve DIR`, with a helper process as vLLM has them. DIR/fault and DIR/hold say
    what goes wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["serve"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--uds", required=True)
    parser.add_argument("--served-model-name", required=True, choices=[NAME])
    parser.add_argument("--generation-config", required=True, choices=["vllm"])
    parser.add_argument("--max-logprobs", type=int, default=20)
    parser.add_argument("--max-model-len", type=lambda text: 100 if text == "auto" else int(text))
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--enable-prompt-tokens-details", action="store_true", required=True)
    parser.add_argument("--disable-uvicorn-access-log", action="store_true")
    args = parser.parse_args()
    fault = args.model / "fault"
    if fault.exists():
        print("(EngineCore pid=7) ERROR 11-24 20:00:00 [core.py:9] ValueError: no such kernel")
        print("RuntimeError: Engine core initialization failed. See root cause above.")
        sys.exit(1)
    engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (args.model / "engine.pid").write_text(str(engine.pid))
    (args.model / "arguments").write_text("\n".join(sys.argv[1:]))
    made = StandIn(args.max_model_len, args.max_logprobs)
    hold = args.model / "hold"
    if hold.exists():
        made.hold_at = int(hold.read_text())
    uvicorn.run(made.app, uds=args.uds, log_config=None, lifespan="off")


if __name__ == "__main__":
    main()
