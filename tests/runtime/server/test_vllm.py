"""The vLLM engine in front of a stand-in that speaks vLLM's HTTP interface."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import httpx
import pytest

from dsq.errors import DsqError, InputError, UnsupportedError
from dsq.runtime.server.backend import (
    Backend,
    Busy,
    GenerateRequest,
    PromptTooLong,
    Sampling,
    WorkerDied,
)
from dsq.runtime.server.vllm_backend import VllmBackend
from dsq.runtime.server.vllm_protocol import completion_body
from dsq.tokenizer_port.tokenizer import Tokenizer
from tests.runtime.server.scripted_backend import pool_of, serving, wait_until
from tests.runtime.server.vllm_helpers import PROMPT, REQUEST, ask, at, greedy, run, tokens_of
from tests.runtime.server.vllm_standin import StandIn, logits_after, logprobs_of, standing_in
from tests.tiny_gguf import BEGIN, BOS, END, HOLE, token_id


@pytest.fixture
def standin() -> StandIn:
    return StandIn()


@pytest.fixture
def url(standin: StandIn) -> Iterator[str]:
    with standing_in(standin) as found:
        yield found


# Answers


def test_greedy_tokens_come_one_at_a_time(url: str) -> None:
    async def test(backend: VllmBackend) -> None:
        checked: Backend = backend
        assert checked.healthy
        assert (checked.info.n_ctx, checked.info.n_vocab, checked.info.n_slots) == (100, 292, 256)
        steps = await ask(backend, REQUEST)
        assert tokens_of(steps) == greedy(PROMPT, 10)
        assert [len(s.token_ids) for s in steps] == [1] * 10
        assert [s.finish for s in steps] == [None] * 9 + ["length"]
        first, last = steps[0].usage, steps[-1].usage
        assert first is not None
        assert last is not None
        assert (first.n_prompt, first.n_generated) == (3, 1)
        assert (last.n_prompt, last.n_cached, last.n_generated) == (3, 7, 10)
        stats = await checked.stats()
        assert (stats.generated_tokens_total, stats.cached_tokens_total) == (10, 7)
        assert (stats.kv_used, stats.kv_size) == (200, 800)
        assert (stats.n_busy, stats.n_queued, stats.tokens_per_second) == (0, 0, 1.0)

    run(at(url), test)


def test_a_stop_token_ends_the_answer_and_is_not_shown(url: str) -> None:
    expected = greedy(PROMPT, 10)
    request = replace(REQUEST, stop_ids=frozenset({expected[4], 5}), n_logprobs=2)

    async def test(backend: VllmBackend) -> None:
        steps = await ask(backend, request)
        assert tokens_of(steps) == expected[:4]
        assert steps[-1].finish == "stop"
        assert steps[-1].logprobs == ()
        assert steps[-1].usage is not None
        assert steps[-1].usage.n_generated == 4

    run(at(url), test)


def test_logprobs_are_the_models_own(url: str) -> None:
    async def test(backend: VllmBackend) -> None:
        biased = greedy(PROMPT, 1)[0]
        request = replace(
            REQUEST,
            max_tokens=2,
            n_logprobs=3,
            prompt_logprobs=True,
            logit_bias=((biased, -float("inf")),),
        )
        steps = await ask(backend, request)
        first, second = tokens_of(steps)
        assert [first, second] == greedy(PROMPT, 2, {biased: -1e9})
        values = logprobs_of(logits_after(list(PROMPT)))
        best = sorted(range(292), key=lambda i: -values[i])[:3]
        assert steps[0].logprobs is not None
        assert steps[0].logprobs[0].logprob == pytest.approx(values[first])
        assert [i for i, _ in steps[0].logprobs[0].top] == best
        assert biased in best, "the alternatives are those before the bias"
        assert steps[0].prompt_logprobs is not None
        none, one, two = steps[0].prompt_logprobs
        assert none is None
        assert one is not None
        assert two is not None
        assert one.logprob == pytest.approx(logprobs_of(logits_after([40]))[41])
        assert two.logprob == pytest.approx(logprobs_of(logits_after([40, 41]))[42])
        assert steps[1].prompt_logprobs is None

    run(at(url), test)


def test_many_at_once_get_each_its_own(url: str) -> None:
    async def test(backend: VllmBackend) -> None:
        prompts = [(i, i + 1) for i in range(20, 40)]
        found = await asyncio.gather(*(ask(backend, GenerateRequest(p, 4)) for p in prompts))
        assert [tokens_of(steps) for steps in found] == [greedy(p, 4) for p in prompts]

    run(at(url), test)


def test_text_that_breaks_lines_elsewhere_breaks_no_event(url: str, standin: StandIn) -> None:
    standin.text = "\u2028\x85\x0b"  # ends of lines to httpx, and plain text in JSON

    async def test(backend: VllmBackend) -> None:
        assert tokens_of(await ask(backend, REQUEST)) == greedy(PROMPT, 10)

    run(at(url), test)


# What vLLM is asked for


def test_dsq_alone_decides_about_sampling_and_stops() -> None:
    sampling = Sampling(0.7, 5, 0.0, 0.1, repeat_penalty=1.1, repeat_last_n=-1, seed=3)
    request = GenerateRequest(
        PROMPT,
        1000,
        sampling,
        frozenset({9, 2}),
        ((4, float("-inf")), (5, 1e9), (6, 2.5)),
        grammar='root ::= "a"',
        cache_prompt=False,
    )
    body = completion_body(request, "m", 100)
    salt = body.pop("cache_salt")
    assert len(salt) == 32
    assert completion_body(request, "m", 100)["cache_salt"] != salt
    assert body == {
        "model": "m",
        "prompt": [40, 41, 42],
        "max_tokens": 97,
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 1e-6,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": 3,
        "stop_token_ids": [2, 9],
        "ignore_eos": True,
        "logit_bias": {"4": -100.0, "5": 100.0, "6": 2.5},
        "structured_outputs": {"grammar": 'root ::= "a"'},
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    json.dumps(body, allow_nan=False)


def test_a_window_for_penalties_is_refused() -> None:
    request = replace(REQUEST, sampling=Sampling(repeat_penalty=1.2, repeat_last_n=128))
    with pytest.raises(UnsupportedError, match="repeat_last_n is 128.*give -1"):
        completion_body(request, "m", 100)
    off = replace(REQUEST, sampling=Sampling(repeat_penalty=1.2, repeat_last_n=0))
    assert completion_body(off, "m", 100)["repetition_penalty"] == 1.0


def test_the_key_comes_from_the_environment(
    url: str, standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")

    async def test(backend: VllmBackend) -> None:
        await ask(backend, REQUEST)

    run(at(url + "/v1/"), test)
    assert standin.headers[0]["authorization"] == "Bearer secret"


# Cancelling


def test_closing_the_stream_cancels_in_vllm(url: str, standin: StandIn) -> None:
    standin.hold_at = 3

    async def test(backend: VllmBackend) -> None:
        async with aclosing(backend.generate(REQUEST)) as stream:
            await anext(stream)
            assert standin.n_running == 1
        await asyncio.to_thread(wait_until, lambda: standin.n_cancelled == 1)
        assert standin.n_running == 0
        assert (await backend.stats()).n_busy == 0

    run(at(url), test)


def test_a_cancelled_task_cancels_in_vllm(url: str, standin: StandIn) -> None:
    standin.hold_at = 0

    async def test(backend: VllmBackend) -> None:
        task = asyncio.create_task(ask(backend, REQUEST))
        await asyncio.to_thread(wait_until, lambda: standin.n_running == 1)
        task.cancel()
        await asyncio.to_thread(wait_until, lambda: standin.n_cancelled == 1)
        assert standin.n_running == 0

    run(at(url), test)


def test_closing_the_backend_ends_what_runs(url: str, standin: StandIn) -> None:
    standin.hold_at = 3

    async def test(backend: VllmBackend) -> None:
        async with aclosing(backend.generate(REQUEST)) as stream:
            await anext(stream)
            closing = asyncio.create_task(backend.close())
            with pytest.raises(WorkerDied, match="shutting down"):
                async for _ in stream:
                    pass
            await closing
        with pytest.raises(WorkerDied, match="shutting down"):
            await ask(backend, REQUEST)

    run(at(url), test)


# What goes wrong


def test_a_prompt_that_is_too_long_is_not_sent(url: str, standin: StandIn) -> None:
    async def test(backend: VllmBackend) -> None:
        with pytest.raises(PromptTooLong) as caught:
            await ask(backend, GenerateRequest((1,) * 100, 1))
        assert (caught.value.n_prompt, caught.value.n_ctx) == (100, 100)
        assert not standin.bodies
        assert len(tokens_of(await ask(backend, GenerateRequest((1,) * 99, 50)))) == 1

    run(at(url), test)


def _error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": "x", "code": status}}


@pytest.mark.parametrize(
    ("refusal", "kind", "match"),
    [
        (_error(400, "top_p\n must"), InputError, "vLLM refuses the request: top_p must"),
        (_error(400, "This model's maximum context length is 9"), PromptTooLong, "has 3 tokens"),
        ((422, {"object": "error", "message": "old shape"}), InputError, "old shape"),
        (_error(401, "no"), DsqError, "VLLM_API_KEY"),
        (_error(404, "no dsq"), DsqError, "no longer has this model"),
        (_error(429, "full"), Busy, "vLLM is busy: full"),
        ((500, ""), WorkerDied, r"vLLM failed \(HTTP 500\).*send the request again"),
        (_error(503, "paused"), WorkerDied, "paused"),
        ((502, "<html>Bad gateway</html>"), WorkerDied, "HTTP 502.*Bad gateway"),
    ],
)
def test_refusals(
    url: str, standin: StandIn, refusal: tuple[int, Any], kind: type[DsqError], match: str
) -> None:
    standin.refuse = refusal

    async def test(backend: VllmBackend) -> None:
        with pytest.raises(kind, match=match) as caught:
            await ask(backend, REQUEST)
        assert type(caught.value) is kind
        standin.refuse = None
        assert tokens_of(await ask(backend, REQUEST)) == greedy(PROMPT, 10)

    run(at(url), test)


def test_what_vllm_itself_refuses_reaches_the_client(url: str) -> None:
    async def test(backend: VllmBackend) -> None:
        with pytest.raises(InputError, match=r"temperature must be in \[0, 2\], got 3"):
            await ask(backend, replace(REQUEST, sampling=Sampling(temperature=3.0)))

    run(at(url), test)


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        ("cut_at", "connection to vLLM was lost"),
        ("fail_at", "HTTP 500.*EngineCore died"),
        ("quit_at", "ended the answer too early"),
    ],
)
def test_an_answer_that_breaks_off(url: str, standin: StandIn, fault: str, match: str) -> None:
    setattr(standin, fault, 2)

    async def test(backend: VllmBackend) -> None:
        got: list[int] = []
        with pytest.raises(WorkerDied, match=match):
            async for step in backend.generate(REQUEST):
                got += step.token_ids
        assert got == greedy(PROMPT, 2)

    run(at(url), test)


def test_a_full_queue_is_busy(url: str, standin: StandIn) -> None:
    standin.hold_at = 0

    async def test(backend: VllmBackend) -> None:
        two = [asyncio.create_task(ask(backend, REQUEST)) for _ in range(2)]
        await asyncio.to_thread(wait_until, lambda: standin.n_running == 2)
        with pytest.raises(Busy, match="1 requests wait already"):
            await ask(backend, REQUEST)
        stats = await backend.stats()
        assert (stats.n_busy, stats.n_queued) == (1, 1)
        standin.go.set()
        assert [tokens_of(steps) for steps in await asyncio.gather(*two)] == [
            greedy(PROMPT, 10)
        ] * 2

    run(at(url, n_parallel=1), test, max_queued=1)


def test_nobody_at_the_url() -> None:
    async def test(backend: VllmBackend) -> None: ...

    with pytest.raises(InputError, match=r"--vllm-url http://127\.0\.0\.1:9: it does not answer"):
        run(at("http://127.0.0.1:9"), test)


def test_one_at_a_url_that_goes_and_comes_back(
    standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsq.runtime.server.vllm_backend._WATCH_S", 0.02)

    async def test(backend: VllmBackend) -> None:
        await ask(backend, REQUEST)
        standin.health = 503
        while backend.healthy:
            await asyncio.sleep(0.01)
        waiting = asyncio.create_task(ask(backend, REQUEST))
        await asyncio.sleep(0)
        standin.health = 200
        assert tokens_of(await waiting) == greedy(PROMPT, 10)
        assert (await backend.stats()).restarts == 0

    with standing_in(standin) as url:
        run(at(url), test)


# The whole server


@pytest.fixture
def client(url: str, tokenizer: Tokenizer) -> Iterator[httpx.Client]:
    pool = pool_of(VllmBackend(at(url)), tokenizer)  # type: ignore[arg-type]
    with serving(pool) as base, httpx.Client(base_url=base, verify=False) as made:
        yield made


def test_fill_in_the_middle_goes_through(
    client: httpx.Client, standin: StandIn, tokenizer: Tokenizer
) -> None:
    found = client.post(
        "/v1/completions",
        json={"prompt": "def ", "suffix": " end", "max_tokens": 5, "temperature": 0},
    ).json()
    (body,) = standin.bodies
    begin, hole, end = (token_id(t) for t in (BEGIN, HOLE, END))
    before, after = (tokenizer.encode(t, add_bos=False) for t in ("def ", " end"))
    assert body["prompt"] == [token_id(BOS), begin, *before, hole, *after, end]
    assert set(body["stop_token_ids"]) == tokenizer.stop_ids("complete")
    said = greedy(tuple(body["prompt"]), 5)
    assert found["choices"][0]["text"] == tokenizer.decode(said)
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == 5


def test_a_stop_string_cancels_in_vllm(client: httpx.Client, standin: StandIn) -> None:
    said = client.post(
        "/completion", json={"prompt": "x", "n_predict": 12, "temperature": 0}
    ).json()
    stop = said["content"][3:5]
    standin.hold_at = 11
    found = client.post(
        "/completion", json={"prompt": "x", "n_predict": 12, "temperature": 0, "stop": stop}
    ).json()
    assert found["content"] == said["content"][: said["content"].index(stop)]
    wait_until(lambda: standin.n_cancelled == 1)


def test_errors_reach_the_client_with_their_status(client: httpx.Client, standin: StandIn) -> None:
    long = client.post("/v1/completions", json={"prompt": [40] * 100})
    assert long.status_code == 400
    assert long.json()["error"]["n_prompt_tokens"] == 100
    standin.refuse = (500, "")
    broken = client.post("/v1/completions", json={"prompt": "x"})
    assert broken.status_code == 503
    assert "Retry-After" in broken.headers


def test_chat_streams(client: httpx.Client, standin: StandIn, tokenizer: Tokenizer) -> None:
    asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "stream": True}
    lines = client.post("/v1/chat/completions", json=asked).text.split("\n\n")
    deltas = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    text = "".join(d["choices"][0]["delta"].get("content") or "" for d in deltas if d["choices"])
    (body,) = standin.bodies
    assert body["prompt"] == tokenizer.chat(asked["messages"])  # type: ignore[arg-type]
    assert text == tokenizer.decode(greedy(tuple(body["prompt"]), 4))
