"""Against the real vLLM: run by `make test-vllm`, which sets DSQ_VLLM. No part of the suite."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import LlamaForCausalLM

from dsq.runtime.source import Source
from dsq.tokenizer_port.tokenizer import Tokenizer
from tests.models import llama_config, write_hf
from tests.runtime.server.vllm_standin import StandIn, standing_in

VLLM = os.environ["DSQ_VLLM"]
N_CTX = 512
# Random weights give flat logits, so a token decides about the next by a hair: only in float32 do
# two programs agree on it.
ARGUMENTS = "--dtype float32 --enforce-eager"
PROMPTS = [[1, *range(5 + 3 * i, 40 + 7 * i)] for i in range(6)]
N = 24
NO_KERNEL = "no attribute 'cpu_gemm_wna16'"  # built only with AVX-512


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = llama_config(torch_dtype="float32")
    return write_hf(tmp_path_factory.mktemp("model"), config, dtype="F32")


@pytest.fixture(scope="module")
def reference(model: Path) -> LlamaForCausalLM:
    torch.set_num_threads(1)
    return LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_vocabulary(Source(model).vocabulary)


@torch.no_grad()
def logits_of(reference: LlamaForCausalLM, tokens: list[int]) -> torch.Tensor:
    """(n_tokens, n_vocab)"""
    found: torch.Tensor = reference(torch.tensor([tokens])).logits[0]
    return found


def greedy(reference: LlamaForCausalLM, prompt: list[int], n: int = N) -> list[int]:
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(logits_of(reference, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@contextmanager
def process(command: list[str], ready: str, log: Path, **environ: str) -> Iterator[re.Match[str]]:
    """A server, from the line that says it is ready to its end by SIGTERM."""
    with open(log, "wb") as out:
        started = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **environ},
        )
        try:
            limit = time.monotonic() + 400
            while not (match := re.search(ready, log.read_text(errors="replace"))):
                if started.poll() is not None:
                    raise ServerEnded(log.read_text(errors="replace"))
                assert time.monotonic() < limit, log.read_text(errors="replace")
                time.sleep(0.2)
            yield match
        finally:
            started.send_signal(signal.SIGTERM)
            started.wait(60)


class ServerEnded(Exception):
    pass


@contextmanager
def dsq_serve(model: Path, log: Path, *more: str) -> Iterator[httpx.Client]:
    command = [sys.executable, "-m", "dsq.cli.main", "serve", str(model), "--port", "0"]
    command += ["--engine", "vllm", *more]
    with (
        process(command, r" on (http://\S+)", log) as found,
        httpx.Client(base_url=found[1], timeout=120, trust_env=False) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def vllm(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """vLLM, by itself, as somebody else would run it for `--vllm-url`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [VLLM, "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", str(N_CTX), "--served-model-name", "theirs"]
    command += ["--enable-prompt-tokens-details", *ARGUMENTS.split()]
    log = tmp_path_factory.mktemp("vllm") / "log"
    with (
        process(command, r"(Application startup complete)", log, VLLM_NO_USAGE_STATS="1"),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def dsq(
    vllm: httpx.Client, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """dsq in front of it."""
    log = tmp_path_factory.mktemp("dsq") / "log"
    with dsq_serve(model, log, "--vllm-url", str(vllm.base_url)) as client:
        yield client


def ask(client: httpx.Client, prompt: Any, n: int = N, **more: Any) -> dict[str, Any]:
    asked = {"prompt": prompt, "n_predict": n, "temperature": 0, "return_tokens": True, **more}
    answer = client.post("/completion", json=asked)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_started_by_dsq_it_says_what_transformers_says(
    model: Path, reference: LlamaForCausalLM, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    more = (
        "--vllm",
        VLLM,
        "--vllm-args",
        ARGUMENTS,
        "-c",
        str(N_CTX),
        "--tensor-parallel-size",
        "1",
    )
    with dsq_serve(model, log, *more) as client:
        for prompt in PROMPTS:
            assert ask(client, prompt, ignore_eos=True)["tokens"] == greedy(reference, prompt)
        stats = client.get("/stats").json()["models"][0]
        assert stats["kv_size"] > N_CTX
        assert stats["memory_bytes"] > 100e6
    text = log.read_text()
    assert "starting " in text
    assert "Traceback" not in text
    left = subprocess.run(["pgrep", "-f", str(model)], capture_output=True, text=True)
    assert not left.stdout, "vLLM goes with its server"


def test_at_once_and_streamed(dsq: httpx.Client, reference: LlamaForCausalLM) -> None:
    expected = [greedy(reference, prompt) for prompt in PROMPTS]
    several = ask_many(dsq, PROMPTS)
    assert several == expected
    asked = {
        "prompt": PROMPTS[0],
        "n_predict": N,
        "temperature": 0,
        "stream": True,
        "return_tokens": True,
        "ignore_eos": True,
    }
    lines = dsq.post("/completion", json=asked).text.split("\n\n")
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert len(events) > 2
    assert [t for event in events[:-1] for t in event["tokens"]] == expected[0]


def ask_many(client: httpx.Client, prompts: list[list[int]]) -> list[list[int]]:
    async def all_of_them() -> list[list[int]]:
        async with httpx.AsyncClient(
            base_url=client.base_url, timeout=120, trust_env=False
        ) as many:
            answers = await asyncio.gather(
                *(
                    many.post(
                        "/completion",
                        json={
                            "prompt": p,
                            "n_predict": N,
                            "temperature": 0,
                            "return_tokens": True,
                            "ignore_eos": True,
                        },
                    )
                    for p in prompts
                )
            )
        return [answer.json()["tokens"] for answer in answers]

    return asyncio.run(all_of_them())


def test_logprobs_of_prompt_and_answer(dsq: httpx.Client, reference: LlamaForCausalLM) -> None:
    prompt = PROMPTS[1]
    asked = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "logprobs": 5, "echo": True}
    found = dsq.post("/v1/completions", json=asked).json()["choices"][0]["logprobs"]
    tokens = [*prompt, *greedy(reference, prompt, 4)]
    expected = logits_of(reference, tokens).log_softmax(-1)
    got = found["token_logprobs"]
    assert got[0] is None
    assert len(got) == len(tokens)
    wanted = [float(expected[i - 1, tokens[i]]) for i in range(1, len(tokens))]
    assert got[1:] == pytest.approx(wanted, abs=2e-3)
    best = expected[-2].topk(5).values.tolist()
    assert sorted(found["top_logprobs"][-1].values(), reverse=True) == pytest.approx(best, abs=2e-3)


def test_stops_and_biases(
    dsq: httpx.Client, vllm: httpx.Client, reference: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    prompt = PROMPTS[2]
    said = greedy(reference, prompt)
    eos = min(tokenizer.stop_ids("complete"))
    forced = ask(dsq, prompt, logit_bias=[[eos, 100]])
    assert forced["tokens"] == []
    assert forced["stop_type"] == "eos"
    without = ask(dsq, prompt, 1, logit_bias=[[said[0], False]])
    assert without["tokens"][0] != said[0]
    logits = logits_of(reference, prompt)[-1]
    logits[said[0]] = -torch.inf
    assert without["tokens"][0] == int(logits.argmax())


def test_a_grammar(dsq: httpx.Client) -> None:
    asked = {
        "prompt": "x",
        "max_tokens": 60,
        "temperature": 0,
        "grammar": 'root ::= "yes" | "no, " [a-c]{3} "."',
    }
    found = dsq.post("/v1/completions", json=asked)
    assert found.status_code == 200, found.text
    assert re.fullmatch(r"yes|no, [abc]{3}\.", found.json()["choices"][0]["text"])
    assert found.json()["choices"][0]["finish_reason"] == "stop"
    bad = dsq.post("/v1/completions", json={**asked, "grammar": "root ::= ("})
    assert bad.status_code == 400


def test_fill_in_the_middle(
    dsq: httpx.Client, reference: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    """dsq builds the prompt; vLLM sees token ids only."""
    vocabulary = tokenizer.vocab
    if vocabulary.fim_suffix is None:
        pytest.skip("tiny-coder's tokenizer has no fill in the middle")
    asked = {
        "prompt": "def f(a):\n",
        "suffix": "\n    return a\n",
        "max_tokens": 8,
        "temperature": 0,
    }
    text = dsq.post("/v1/completions", json=asked).json()["choices"][0]["text"]
    from dsq.runtime.server.infill import infill

    ids = infill(tokenizer, asked["prompt"], asked["suffix"], n_ctx=N_CTX, n_predict=8).ids
    said = greedy(reference, list(ids), 8)
    stops = [i for i, token in enumerate(said) if token in tokenizer.stop_ids("complete")]
    assert text == tokenizer.decode(said[: stops[0]] if stops else said)


def test_cancelling_reaches_vllm(dsq: httpx.Client, vllm: httpx.Client) -> None:
    def running() -> float:
        text = vllm.get("/metrics").text
        return sum(map(float, re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", text, re.M)))

    asked = {"prompt": PROMPTS[0], "n_predict": 400, "stream": True, "ignore_eos": True}
    limit = time.monotonic() + 30
    with dsq.stream("POST", "/completion", json=asked) as answer:
        next(answer.iter_bytes())
        while not running():
            assert time.monotonic() < limit
    began = time.monotonic()
    while running():
        assert time.monotonic() < limit, "it goes on in vLLM"
    print(f"ended {time.monotonic() - began:.2f} s after the client left")


def test_a_prefix_is_cached(dsq: httpx.Client) -> None:
    prompt = [7] * 300
    first, second = ask(dsq, prompt, 2), ask(dsq, [*prompt, 8], 2)
    alone = ask(dsq, [*prompt, 9], 2, cache_prompt=False)
    assert first["timings"]["cache_n"] == 0
    assert second["timings"]["cache_n"] >= 200
    assert alone["timings"]["cache_n"] == 0


def test_what_vllm_refuses(dsq: httpx.Client) -> None:
    refused = dsq.post("/completion", json={"prompt": "x", "presence_penalty": 3.0})
    assert refused.status_code == 400
    assert "presence_penalty" in refused.json()["error"]["message"]
    long = dsq.post("/completion", json={"prompt": [9] * N_CTX})
    assert long.status_code == 400
    assert long.json()["error"]["n_ctx"] == N_CTX


def test_the_stand_in_speaks_as_vllm_does(vllm: httpx.Client) -> None:
    """The keys of what both send, and what both refuse."""
    body = {
        "model": "theirs",
        "prompt": [1, 40, 41],
        "max_tokens": 1,  # of more, vLLM sends several in one event when it is busy
        "temperature": 0.0,
        "top_k": -1,
        "top_p": 1.0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": [],
        "ignore_eos": True,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "logprobs": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    }

    def events(client: httpx.Client, **more: Any) -> list[dict[str, Any]]:
        lines = client.post("/v1/completions", json={**body, **more}).text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line[6:]) for line in lines[:-2]]

    with ExitStack() as stack:
        url = stack.enter_context(standing_in(StandIn(N_CTX)))
        standin = stack.enter_context(httpx.Client(base_url=url, trust_env=False))
        for more in ({}, {"echo": True}):
            theirs, ours = events(vllm, **more), events(standin, **more)
            assert len(theirs) == len(ours) == 2
            for a, b in zip(theirs, ours, strict=True):
                assert set(b) <= set(a)
                for x, y in zip(a["choices"], b["choices"], strict=True):
                    assert set(y) <= set(x)
                    assert len(x["token_ids"]) == len(y["token_ids"]) == 1
                    for key in ("tokens", "token_logprobs", "top_logprobs"):
                        assert len(x["logprobs"][key]) == len(y["logprobs"][key])
                    assert x["finish_reason"] == y["finish_reason"]
        for more in ({"prompt": [9] * N_CTX}, {"temperature": 2.5}, {"top_p": 0.0}):
            answers = [c.post("/v1/completions", json={**body, **more}) for c in (vllm, standin)]
            assert [a.status_code for a in answers] == [400, 400], (more, answers[0].text)
            assert isinstance(answers[0].json()["error"]["message"], str)
        a, b = (c.get("/v1/models").json()["data"][0] for c in (vllm, standin))
        assert set(b) <= set(a)


def test_our_gptq_loads_in_vllm(model: Path, tmp_path: Path) -> None:
    """Issue 5. vLLM's build for CPUs has no GPTQ kernel on AVX2: then this says so."""
    folder, text = tmp_path / "gptq", tmp_path / "text"
    text.write_text("def add(a, b):\n    return a + b\n" * 400)
    convert = [sys.executable, "-m", "dsq.cli.main", "convert", str(model), "--to", "gptq"]
    convert += ["--bits", "4", "--group-size", "64", "--text", str(text), "--tokens", "2048"]
    subprocess.run([*convert, "-o", str(folder)], check=True)
    from dsq.runtime.torch_engine import TorchEngine

    prompt = PROMPTS[0]
    with TorchEngine(folder, n_ctx=N_CTX, n_threads=1) as engine:
        expected = torch.from_numpy(engine.eval(prompt)).log_softmax(-1)
    log = tmp_path / "log"
    more = ("--vllm", VLLM, "--vllm-args=--enforce-eager", "-c", str(N_CTX))
    with dsq_serve(folder, log, *more) as client:  # so it takes the files
        asked = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": 10}
        answer = client.post("/completion", json=asked)
        if answer.status_code == 503:
            limit = time.monotonic() + 60
            while "restarting it" not in (said := log.read_text()):
                assert time.monotonic() < limit
                time.sleep(0.1)
            died = next(line for line in said.splitlines() if "restarting it" in line)
            if NO_KERNEL in died:
                pytest.skip(f"it loads, and this vLLM has no kernel to run it: {died}")
    found = answer.json()["completion_probabilities"][0]
    for top in found["top_logprobs"]:
        assert top["logprob"] == pytest.approx(float(expected[top["id"]]), abs=0.05)


if __name__ == "__main__":
    pytest.main([__file__])
