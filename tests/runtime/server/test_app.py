"""The gate, llama.cpp's endpoints, and bodies that no client should send: never a 500."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import ASGIApp

from dsq.errors import InputError
from dsq.runtime.server.app import build_app
from dsq.runtime.server.backend import GenerateRequest
from dsq.runtime.server.limits import LOCAL_HOSTS, Limits, check_binding
from dsq.runtime.server.transport import TimeLimits
from dsq.tokenizer_port.tokenizer import Tokenizer
from tests.runtime.server.scripted_backend import (
    ScriptedBackend,
    pool_of,
    serving,
    wait_until,
)
from tests.tiny_gguf import BEGIN, BOS, END, EOS, HOLE, token_id

KEY = "a-key-of-some-length"
CHAT = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def backend(tokenizer: Tokenizer) -> ScriptedBackend:
    ids = tokenizer.encode("in the\nend", add_bos=False)
    return ScriptedBackend(lambda request: [*ids, token_id(EOS)])


@pytest.fixture(scope="module")
def shared(tokenizer: Tokenizer) -> Iterator[tuple[httpx.Client, ScriptedBackend]]:
    """For requests that never reach the backend."""
    backend = ScriptedBackend(lambda request: [])
    with (
        serving(pool_of(backend, tokenizer)) as url,
        httpx.Client(base_url=url, verify=False) as made,
    ):
        yield made, backend


@pytest.fixture
def client(backend: ScriptedBackend, tokenizer: Tokenizer) -> Iterator[httpx.Client]:
    with (
        serving(pool_of(backend, tokenizer), Limits(hosts=LOCAL_HOSTS, max_body=2**16)) as url,
        httpx.Client(base_url=url, verify=False) as made,
    ):
        yield made


# llama.cpp's endpoints


def test_native_completion(client: httpx.Client, backend: ScriptedBackend) -> None:
    sent = {"prompt": "x", "n_predict": 20, "return_tokens": True, "n_probs": 2}
    found = client.post("/completion", json=sent).json()
    assert found["content"] == "in the\nend"
    assert (found["stop"], found["stop_type"], found["truncated"]) == (True, "eos", False)
    assert found["has_new_line"] is True
    assert found["tokens_evaluated"] == 2
    assert found["timings"]["predicted_n"] == len(found["tokens"])
    assert len(found["completion_probabilities"]) == len(found["tokens"])
    assert len(found["completion_probabilities"][0]["top_logprobs"]) == 2
    assert found["generation_settings"]["n_predict"] == 20
    assert found["prompt"] == f"{BOS}x"
    chosen = client.post(
        "/completion", json={**sent, "response_fields": ["content", "timings/prompt_n", "no/such"]}
    )
    assert chosen.json() == {"content": "in the\nend", "timings/prompt_n": 1}


def test_native_stream(client: httpx.Client, tokenizer: Tokenizer) -> None:
    sent = {"prompt": "x", "stream": True, "stop": ["end"]}
    with client.stream("POST", "/completion", json=sent) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line]
    assert "".join(event["content"] for event in events) == "in the\n"
    assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]
    assert (events[-1]["stop_type"], events[-1]["stopping_word"]) == ("word", "end")
    assert sum(len(event["tokens"]) for event in events) == len(
        tokenizer.encode("in the\n", add_bos=False)
    )


def test_prompts_of_ids_and_texts(
    client: httpx.Client, backend: ScriptedBackend, tokenizer: Tokenizer
) -> None:
    a = token_id("a")
    found = client.post("/completion", json={"prompt": [a, "the", token_id(EOS)]})
    assert found.status_code == 200
    wanted = (a, *tokenizer.encode("the", add_bos=False), token_id(EOS))
    assert backend.requests[-1].prompt_ids == wanted
    several = client.post("/completion", json={"prompt": ["a", [a, a], {"prompt_string": "b"}]})
    assert [answer["index"] for answer in several.json()] == [0, 1, 2]
    assert client.post("/completion", json={"prompt": [10**6]}).status_code == 400
    client.post("/completion", json={"prompt": EOS, "parse_special": True})
    assert backend.requests[-1].prompt_ids == (token_id(BOS), token_id(EOS))


def test_infill(client: httpx.Client, backend: ScriptedBackend, tokenizer: Tokenizer) -> None:
    sent = {
        "input_prefix": "def f():\n",
        "input_suffix": "\n",
        "prompt": "    re",
        "input_extra": [{"filename": "a.py", "text": "x"}],
        "n_predict": 8,
    }
    found = client.post("/infill", json=sent).json()
    assert found["content"] == "in the\nend"
    dropped = found["dsq"]
    assert {"dropped_prefix_tokens", "dropped_suffix_tokens", "dropped_extra_files"} <= set(dropped)
    assert not any(dropped.values())
    text = tokenizer.decode(backend.requests[0].prompt_ids, skip_special=False)
    assert text.startswith(f"{BOS}{BEGIN}")
    assert text.endswith(f"def f():\n    re{HOLE}\n{END}")
    assert 0 < text.index("a.py") < text.index("x\n")
    for extra in ({}, {"filename": "ok"}, {"filename": 1, "text": "abc"}):
        answer = client.post("/infill", json={**sent, "input_extra": [extra]})
        assert answer.status_code == 400
        assert "input_extra" in answer.json()["error"]["message"]


def test_an_infill_ends_after_its_time_at_a_lines_end(
    client: httpx.Client, backend: ScriptedBackend
) -> None:
    def slow(request: GenerateRequest) -> Iterator[int]:
        began = time.perf_counter()
        yield token_id("a")
        while time.perf_counter() < began + 0.002:
            yield token_id("b")
        yield token_id("Ċ")
        yield token_id("c")

    backend.script = slow
    sent = {"input_prefix": "a", "input_suffix": "", "t_max_predict_ms": 1}
    found = client.post("/infill", json=sent).json()
    assert found["stop_type"] == "limit"
    assert found["content"].endswith("b\n")


def test_tokenize_and_back(client: httpx.Client, tokenizer: Tokenizer) -> None:
    text = f"the {EOS}é"
    ids = client.post("/tokenize", json={"content": text}).json()["tokens"]
    assert ids == tokenizer.encode(text, add_bos=False, parse_special=True)
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"content": text}
    sent = {"content": "é", "add_special": True, "with_pieces": True, "parse_special": False}
    pieces = client.post("/tokenize", json=sent).json()["tokens"]
    assert [piece["piece"] for piece in pieces] == [BOS, [0xC3], [0xA9]]
    assert client.post("/detokenize", json={"tokens": [99999]}).status_code == 400


def test_health_and_metrics(client: httpx.Client, backend: ScriptedBackend) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    client.post("/completion", json={"prompt": "x"})
    text = client.get("/metrics").text
    assert 'dsq_requests_total{route="/completion",status="200"} 1.0' in text
    assert 'dsq_tokens_per_second{model="tiny"} 7.5' in text
    assert client.get("/stats").json()["models"][0]["memory_bytes"] == 2**20
    backend.healthy = False
    assert client.get("/health").status_code == 503


# The gate


def test_a_key_is_asked_for_where_there_is_one(
    backend: ScriptedBackend, tokenizer: Tokenizer
) -> None:
    limits = Limits(api_keys=("another-key", KEY))
    with (
        serving(pool_of(backend, tokenizer), limits) as url,
        httpx.Client(base_url=url, verify=False) as client,
    ):
        for path in ("/v1/models", "/metrics", "/stats", "/openapi.json", "/no/such"):
            assert client.get(path).status_code == 401
        for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": f"Basic {KEY}"}):
            answer = client.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert not backend.requests
        for headers in ({"Authorization": f"Bearer {KEY}"}, {"X-Api-Key": KEY}):
            answer = client.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert answer.status_code == 200
        assert client.get("/health").status_code == 200
        assert client.get("/").status_code == 200


def test_other_machines_need_a_key() -> None:
    assert check_binding("127.0.0.1", ())
    assert check_binding("::1", ())
    assert not check_binding("0.0.0.0", (KEY,))
    with pytest.raises(InputError, match="--api-key"):
        check_binding("0.0.0.0", ())
    with pytest.raises(InputError, match="shorter"):
        check_binding("127.0.0.1", ("abc",))


def test_pages_of_other_sites_may_not_use_the_server(
    client: httpx.Client, backend: ScriptedBackend, tokenizer: Tokenizer
) -> None:
    port = client.base_url.port
    other = client.post("/completion", json={"prompt": "x"}, headers={"Origin": "http://evil"})
    assert other.status_code == 403
    own = client.post(
        "/completion", json={"prompt": "x"}, headers={"Origin": f"http://127.0.0.1:{port}"}
    )
    assert own.status_code == 200
    assert "access-control-allow-origin" not in own.headers
    rebound = client.get("/v1/models", headers={"Host": f"evil.example:{port}"})
    assert rebound.status_code == 403
    named = Limits(cors=("http://friend",))
    with (
        serving(pool_of(backend, tokenizer), named) as url,
        httpx.Client(base_url=url, verify=False) as second,
    ):
        headers = {"Origin": "http://friend", "Access-Control-Request-Method": "POST"}
        assert second.options("/completion", headers=headers).status_code == 200
        answer = second.post(
            "/completion", json={"prompt": "x"}, headers={"Origin": "http://friend"}
        )
        assert answer.headers["access-control-allow-origin"] == "http://friend"
        answer = second.post("/completion", json={"prompt": "x"}, headers={"Origin": "http://evil"})
        assert answer.status_code == 403


def test_bodies_that_are_too_large(client: httpx.Client) -> None:
    sent = {"prompt": "x" * 2**17}
    assert client.post("/completion", json=sent).status_code == 413
    chunks = (b"x" * 2**14 for _ in range(10))
    assert client.post("/completion", content=chunks).status_code == 413
    assert client.post("/completion", json={"prompt": "x"}).status_code == 200


def test_a_hundred_megabytes(client: httpx.Client) -> None:
    with socket.create_connection(("127.0.0.1", client.base_url.port or 0)) as connection:
        head = b"POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Length: 104857600\r\n\r\n"
        connection.sendall(head)
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_come(backend: ScriptedBackend, tokenizer: Tokenizer) -> None:
    with (
        serving(pool_of(backend, tokenizer), Limits(body_seconds=0.05)) as url,
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection,
    ):
        connection.sendall(b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_too_many_requests_at_once(backend: ScriptedBackend, tokenizer: Tokenizer) -> None:
    backend.hold = threading.Event()
    limits = Limits(max_requests=1)
    with (
        serving(pool_of(backend, tokenizer), limits) as url,
        httpx.Client(base_url=url, verify=False) as client,
    ):
        sent = {"prompt": "x"}
        first = threading.Thread(target=lambda: client.post("/completion", json=sent))
        first.start()
        wait_until(lambda: backend.n_running == 1)
        second = client.post("/completion", json=sent)
        assert second.status_code == 429
        assert int(second.headers["retry-after"]) > 0
        backend.hold.set()
        first.join()
        assert client.post("/completion", json=sent).status_code == 200


def test_an_answer_that_takes_too_long(backend: ScriptedBackend, tokenizer: Tokenizer) -> None:
    backend.hold, backend.hold_at = threading.Event(), 1
    times = TimeLimits(answer=0.1)
    with (
        serving(pool_of(backend, tokenizer), times=times) as url,
        httpx.Client(base_url=url, verify=False) as client,
    ):
        assert client.post("/completion", json={"prompt": "x"}).status_code == 504
        streamed = client.post("/completion", json={"prompt": "x", "stream": True})
        assert streamed.status_code == 200
        assert "took longer than" in streamed.text
        wait_until(lambda: backend.n_running == 0)


def test_a_stream_says_that_it_lives(backend: ScriptedBackend, tokenizer: Tokenizer) -> None:
    backend.hold = threading.Event()
    times = TimeLimits(ping=0.02)
    with (
        serving(pool_of(backend, tokenizer), times=times) as url,
        httpx.Client(base_url=url, verify=False) as client,
        client.stream("POST", "/completion", json={"prompt": "x", "stream": True}) as answer,
    ):
        lines = answer.iter_lines()
        assert next(lines).startswith(":")
        backend.hold.set()
        assert any('"stop":true' in line for line in lines)


def test_a_client_that_never_reads_is_cut(backend: ScriptedBackend, tokenizer: Tokenizer) -> None:
    backend.info = backend.info.__class__(**{**vars(backend.info), "n_ctx": 10**6})
    backend.script = lambda request: [token_id("self")] * 10**6
    times = TimeLimits(send=0.2)
    with (
        serving(pool_of(backend, tokenizer), times=times) as url,
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection,
    ):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = b'{"prompt":"x","stream":true}'
        connection.sendall(
            b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        wait_until(lambda: len(backend.requests) == 1)
        wait_until(lambda: backend.n_running == 0, seconds=30)
        assert backend.n_closed_early == 1


def test_one_line_a_request_and_no_prompt_text(
    backend: ScriptedBackend, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dsq.server")
    for log_prompts in (False, True):
        caplog.clear()
        with serving(pool_of(backend, tokenizer), Limits(log_prompts=log_prompts)) as url:
            httpx.post(f"{url}/completion", json={"prompt": "private"})
            httpx.get(f"{url}/private%0Ax")
        lines = [r.getMessage() for r in caplog.records if "POST" in r.getMessage()]
        assert len(lines) == 1
        assert "POST /completion 200" in lines[0]
        assert ("private" in lines[0]) == log_prompts
        assert all("\n" not in record.getMessage() for record in caplog.records)
        assert not any("/private" in record.getMessage() for record in caplog.records)


# Bodies


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body"),
        (b"{", "no JSON"),
        (b'{"prompt": "x", }', "at character "),
        (b"[]", "the body"),
        (b'"text"', "the body"),
        (b'{"prompt": "\xff"}', "no UTF-8, from byte 12"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": 1}', "prompt: is 1; a string or a list is needed"),
        (b'{"prompt": ["a", 1]}', "prompt.1: is 1; a string or a list is needed"),
        (
            b'{"prompt": [%s]}' % b", ".join([b'"a"'] * 33),
            "prompt: has 33 entries; at most 32 are taken in one request",
        ),
        (b"{}", "prompt: is missing"),
        (b'{"prompt": []}', "prompt"),
        (b'{"prompt": [[]]}', "empty"),
        (b'{"prompt": [-1]}', "prompt"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "x", "temperature": "hot"}', "temperature: is a string; a number is needed"),
        (b'{"prompt": "x", "top_p": 2}', "top_p: is 2; it must be at most 1"),
        (b'{"prompt": "x", "n": 1000000}', "n: "),
        (b'{"prompt": ["a", "b"], "n": 30}', "60 answers"),
        (b'{"prompt": "x", "max_tokens": -5}', "max_tokens"),
        (b'{"prompt": "x", "seed": %s}' % (b"9" * 5000), "more than 4,300 digits"),
        (b'{"prompt": "x", "seed": %s}' % (b"9" * 30), "seed"),
        (b'{"prompt": "x", "stop": ""}', "stop"),
        (b'{"prompt": "x", "stop": [1]}', "stop.0: is 1; a string is needed"),
        (
            b'{"prompt": "x", "stop": [%s]}' % b", ".join([b'"a"'] * 17),
            "stop: has 17 entries; at most 16 are taken in one request",
        ),
        (b'{"prompt": "x", "logit_bias": {"the": 1}}', "'the' is no token id"),
        (b'{"prompt": "x", "logit_bias": {"99999": 1}}', "no token 99999"),
        (b'{"prompt": "x", "logit_bias": [[65, null]]}', "logit_bias"),
        (b'{"prompt": "x", "logprobs": 1000}', "logprobs"),
        (b'{"prompt": "x", "best_of": 4}', "best_of"),
        (b'{"prompt": "x", "mirostat": 2}', "mirostat"),
        (b'{"prompt": ["x"], "suffix": "y"}', "suffix"),
        (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nests its lists and objects deeper"),
        (b'{"prompt": "x", "json_schema": {"type": "cat"}}', "json_schema"),
    ],
)
def test_wrong_bodies_are_refused_in_openais_shape(
    shared: tuple[httpx.Client, ScriptedBackend], body: bytes, message: str
) -> None:
    client, backend = shared
    answer = client.post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]
    assert not backend.requests


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "a"}, 7]}, "messages.1: is 7; an object"),
        ({"messages": [{"role": "user"}]}, "messages.0: content is missing or null"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0: content is missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: is 5; a string"),
        ({"messages": [{"role": "<|x|>", "content": ""}]}, "messages.0.role: is '<|x|>'"),
        ({"messages": [{"role": "wizard", "content": ""}]}, "'user', 'assistant'"),
        ({"messages": [{"role": "tool", "content": ""}]}, "template does not know"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text only"),
        ({**CHAT, "tools": [{"type": "function"}]}, "tools"),
        ({**CHAT, "response_format": {"type": "xml"}}, "response_format"),
        ({**CHAT, "top_logprobs": 3}, "top_logprobs"),
        ({**CHAT, "max_tokens": 0}, "max_tokens"),
    ],
)
def test_wrong_conversations(
    shared: tuple[httpx.Client, ScriptedBackend], body: dict[str, Any], message: str
) -> None:
    answer = shared[0].post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_unknown_paths_and_methods_are_errors_in_the_same_shape(client: httpx.Client) -> None:
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/v1/completions", 405)):
        answer = client.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
    sent = {"messages": [{"role": "user", "content": "x"}]}
    form = client.post("/v1/chat/completions", data=sent)
    assert form.status_code in (400, 415, 422)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
FIELDS = (
    "model prompt suffix messages stream stop temperature top_k top_p min_p seed logit_bias "
    "grammar json_schema n echo logprobs max_tokens response_format stream_options tools "
    "top_logprobs ignore_eos input_prefix input_suffix input_extra n_predict n_probs "
    "response_fields content tokens with_pieces t_max_predict_ms parse_special repeat_last_n"
).split()
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": CHAT,
    "/completion": {"prompt": "x"},
    "/infill": {"input_prefix": "x"},
    "/tokenize": {"content": "x"},
    "/detokenize": {"tokens": [1]},
}


@pytest.fixture(scope="module")
def fuzzed(tokenizer: Tokenizer) -> tuple[ScriptedBackend, ASGIApp]:
    backend = ScriptedBackend(lambda request: [65, token_id(END)])
    return backend, build_app(pool_of(backend, tokenizer))


@settings(deadline=None, max_examples=150)
@given(
    path=st.sampled_from(sorted(GOOD)),
    wild=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3),
)
def test_no_body_makes_a_500(
    fuzzed: tuple[ScriptedBackend, ASGIApp], path: str, wild: dict[str, Any]
) -> None:
    backend, app = fuzzed

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://localhost"
        ) as client:
            body = json.dumps({**GOOD[path], **wild}).encode("utf-8", errors="surrogatepass")
            return await client.post(
                path, content=body, headers={"Content-Type": "application/json"}
            )

    answer = asyncio.run(send())
    assert answer.status_code in (200, 400, 404)
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
    assert backend.n_running == 0
