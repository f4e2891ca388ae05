"""OpenAI's own client against a real server, in front of a backend that says what it is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import openai
import pytest

from dsq.runtime.server.backend import Busy, GenerateRequest, WorkerDied
from dsq.tokenizer_port.tokenizer import Tokenizer
from tests.runtime.server.scripted_backend import (
    Script,
    ScriptedBackend,
    pool_of,
    serving,
    wait_until,
)
from tests.tiny_gguf import BEGIN, BOS, END, EOS, EOT, HOLE, token_id

SAID = "the return é€!"


@contextmanager
def client_of(backend: ScriptedBackend, tokenizer: Tokenizer) -> Iterator[openai.OpenAI]:
    with (
        serving(pool_of(backend, tokenizer)) as url,
        httpx.Client(verify=False) as http,
        openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http
        ) as client,
    ):
        yield client


@pytest.fixture
def says(tokenizer: Tokenizer) -> Script:
    """The backend's answer to everything; it ends with EOS and goes on after it."""
    ids = tokenizer.encode(SAID, add_bos=False)
    return lambda request: [*ids, token_id(EOS), 65, 66]


@pytest.fixture
def backend(says: Script) -> ScriptedBackend:
    return ScriptedBackend(says)


@pytest.fixture
def client(backend: ScriptedBackend, tokenizer: Tokenizer) -> Iterator[openai.OpenAI]:
    with client_of(backend, tokenizer) as made:
        yield made


def ask(client: openai.OpenAI, **how: object) -> openai.types.Completion:
    how = {"model": "any", "prompt": "x", "max_tokens": 50, **how}
    return client.completions.create(**how)  # type: ignore[call-overload, no-any-return]


def test_completion(client: openai.OpenAI, backend: ScriptedBackend, tokenizer: Tokenizer) -> None:
    found = ask(client, prompt=f"the {EOS}")
    (request,) = backend.requests
    assert list(request.prompt_ids) == [
        token_id(BOS),
        *tokenizer.encode(f"the {EOS}", add_bos=False),
    ]
    assert token_id(EOS) not in request.prompt_ids  # the user's text stays text
    assert found.model == "tiny"
    assert found.choices[0].text == SAID
    assert found.choices[0].finish_reason == "stop"
    assert found.usage is not None
    n = len(request.prompt_ids)
    assert (found.usage.prompt_tokens, found.usage.total_tokens) == (
        n,
        n + len(tokenizer.encode(SAID, add_bos=False)),
    )
    assert found.usage.prompt_tokens_details is not None
    assert found.usage.prompt_tokens_details.cached_tokens == 1


def test_chat(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": EOT}]}
    ]
    found = client.chat.completions.create(model="x", messages=messages)  # type: ignore[arg-type]
    (request,) = backend.requests
    assert request.prompt_ids.count(token_id(BOS)) == 1
    assert token_id(EOT) not in request.prompt_ids
    assert token_id(EOT) in request.stop_ids
    assert found.choices[0].message.content == SAID
    assert found.choices[0].message.role == "assistant"


def test_streams_say_the_same(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    options = {"include_usage": True}
    chunks = list(ask(client, stream=True, stream_options=options))  # type: ignore[call-overload]
    assert "".join(c.choices[0].text for c in chunks[:-1]) == SAID
    assert all("�" not in c.choices[0].text for c in chunks[:-1])
    assert [c.choices[0].finish_reason for c in chunks[-3:-1]] == [None, "stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(tokenizer.encode(SAID, add_bos=False))

    chat = list(
        client.chat.completions.create(
            model="x", messages=[{"role": "user", "content": "a"}], stream=True
        )
    )
    assert chat[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chat) == SAID
    assert chat[-1].choices[0].finish_reason == "stop"
    assert len({c.id for c in chat}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_over_several_tokens(
    client: openai.OpenAI, backend: ScriptedBackend, stream: bool
) -> None:
    found = ask(client, stop=["rn é", "zz"], stream=stream)
    chunks = list(found) if stream else [found]  # type: ignore[call-overload]
    assert "".join(c.choices[0].text for c in chunks) == "the retu"
    assert chunks[-1].choices[0].finish_reason == "stop"
    wait_until(lambda: backend.n_running == 0)
    assert backend.n_closed_early == 1  # no token is made for nothing


def test_the_length_limit(client: openai.OpenAI) -> None:
    found = ask(client, max_tokens=2)
    assert found.choices[0].finish_reason == "length"
    assert found.choices[0].text == "the"
    assert ask(client, max_tokens=None).choices[0].text == SAID


def test_fill_in_the_middle_goes_by_the_models_own_tokens(
    client: openai.OpenAI, backend: ScriptedBackend, tokenizer: Tokenizer
) -> None:
    found = ask(client, prompt="def", suffix="turn")
    assert list(backend.requests[0].prompt_ids) == tokenizer.fim("def", "turn")
    assert found.model_extra is not None
    assert found.model_extra["dsq"]["dropped_prefix_tokens"] == 0
    found = ask(client, prompt="ab\n" * 100, suffix="", max_tokens=20)
    ids = backend.requests[1].prompt_ids
    assert [i for i in ids if i in map(token_id, (BOS, BEGIN, HOLE, END))] == [
        token_id(text) for text in (BOS, BEGIN, HOLE, END)
    ]
    n_sent = len(tokenizer.fim("ab\n" * 100, ""))
    assert found.model_extra is not None
    assert found.model_extra["dsq"]["dropped_prefix_tokens"] == n_sent - len(ids) > 0


def test_several_prompts_and_answers(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    backend.script = lambda request: [*request.prompt_ids[-1:], 70 + (request.sampling.seed or 0)]
    found = ask(client, prompt=["a", "b", [97]], n=2, seed=3)
    texts = [choice.text for choice in found.choices]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3, 4, 5]
    assert [text[0] for text in texts[:4]] == ["a", "a", "b", "b"]
    assert texts[0] != texts[1]  # each of n has a seed of its own
    assert found.usage is not None
    assert found.usage.prompt_tokens == 2 + 2 + 1
    streamed = ["", "", ""]
    for chunk in ask(client, prompt=["a", "b", "c"], stream=True):  # type: ignore[call-overload]
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert [text[0] for text in streamed] == ["a", "b", "c"]


def test_echo_and_logprobs(
    client: openai.OpenAI, backend: ScriptedBackend, tokenizer: Tokenizer
) -> None:
    found = ask(client, prompt="the", echo=True, logprobs=2, max_tokens=3).choices[0]
    assert found.text == "thethe re"[: len(found.text)]
    lists = found.logprobs
    assert lists is not None
    assert lists.tokens == [BOS, "t", "he", *[tokenizer.piece(i) for i in backend.script(None)[:3]]]  # type: ignore
    assert lists.text_offset == [0, 0, 1, 3, 4, 6]
    assert lists.token_logprobs == [None, *[-0.5] * 5]
    assert lists.top_logprobs is not None
    assert [len(top or {}) for top in lists.top_logprobs] == [0, 2, 2, 2, 2, 2]
    only = ask(client, prompt="the", echo=True, logprobs=0, max_tokens=0)
    assert only.choices[0].text == "the"
    assert only.usage is not None
    assert only.usage.completion_tokens == 0


def test_chat_logprobs_have_the_bytes_of_half_a_character(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="x", messages=[{"role": "user", "content": "a"}], logprobs=True, top_logprobs=1
    )
    assert found.choices[0].logprobs is not None
    content = found.choices[0].logprobs.content
    assert content is not None
    assert b"".join(bytes(token.bytes or []) for token in content).decode() == SAID
    assert content[0].top_logprobs[0].token == content[0].token


def test_sampling_reaches_the_backend(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    ask(
        client,
        temperature=0.25,
        top_p=0.5,
        seed=-1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"65": -100, "66": 2.5},
        extra_body={"min_p": 0.125, "top_k": 7, "repeat_penalty": 1.5, "ignore_eos": True},
    )
    request = backend.requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.25, 0.5, None)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert (sampling.min_p, sampling.top_k, sampling.repeat_penalty) == (0.125, 7, 1.5)
    bias = dict(request.logit_bias)
    assert bias[65] == -100
    assert bias[66] == 2.5
    assert bias[token_id(EOS)] == float("-inf")
    assert request.stop_ids == frozenset()


def test_a_json_schema_becomes_a_grammar(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    def chat(format_: object) -> GenerateRequest:
        client.chat.completions.create(
            model="x",
            messages=[{"role": "user", "content": "a"}],
            response_format=format_,  # type: ignore[arg-type]
        )
        return backend.requests[-1]

    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    named = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    assert (chat(named).grammar or "").startswith("root ::= ")
    assert "object" in (chat({"type": "json_object"}).grammar or "")
    assert chat({"type": "text"}).grammar is None
    with pytest.raises(openai.BadRequestError, match="pattern.*not supported"):
        chat({"type": "json_object", "schema": {"type": "string", "pattern": "a+"}})


def test_a_prompt_longer_than_the_context(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, prompt="a b " * 100)
    assert error.value.code == "context_length_exceeded"
    body = json.loads(error.value.response.text)["error"]
    assert body["n_ctx"] == 100
    assert body["n_prompt_tokens"] > 200
    assert str(body["n_prompt_tokens"]) in body["message"]


def test_a_full_queue(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    backend.script = lambda request: [Busy(8, 3)]
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as error:
            ask(client, stream=stream)
        assert error.value.response.headers["Retry-After"] == "3"


def test_a_worker_that_dies(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    backend.script = lambda request: [65, WorkerDied("the worker process has ended")]
    with pytest.raises(openai.InternalServerError) as error:
        ask(client)
    assert error.value.status_code == 503
    stream = ask(client, stream=True)
    with pytest.raises(openai.APIError, match="worker process has ended"):
        list(stream)  # type: ignore[call-overload]


def test_an_unexpected_error_shows_nothing_of_itself(
    client: openai.OpenAI, backend: ScriptedBackend
) -> None:
    backend.script = lambda request: [ValueError("secret")]
    with pytest.raises(openai.InternalServerError) as error:
        ask(client)
    assert "secret" not in error.value.response.text


def test_a_client_that_leaves_frees_its_slot(
    client: openai.OpenAI, backend: ScriptedBackend
) -> None:
    import threading

    backend.hold, backend.hold_at = threading.Event(), 1
    stream = ask(client, stream=True)
    assert next(iter(stream)).choices[0].text  # type: ignore[call-overload]
    assert backend.n_running == 1
    stream.close()  # type: ignore[attr-defined]
    wait_until(lambda: backend.n_running == 0)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    ask(client)
    assert client.models.retrieve("tiny").model_extra["meta"]["n_ctx"] == 100  # type: ignore[index]
