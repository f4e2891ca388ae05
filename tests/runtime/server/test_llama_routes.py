"""What llama.cpp's editor plugins and other clients of its server send and look at."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from dsq.runtime.server.indent import Indentation
from dsq.tokenizer_port.tokenizer import Tokenizer
from tests.runtime.server.scripted_backend import ScriptedBackend, pool_of, serving
from tests.tiny_gguf import BOS, EOS, token_id

FUNCTION = "1\n\n    a = 2\n\tb = 3\n  c = 4\nd = 5"
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
def backend(tokenizer: Tokenizer) -> ScriptedBackend:
    ids = tokenizer.encode(FUNCTION, add_bos=False)
    return ScriptedBackend(lambda request: [*ids, token_id(EOS)])


@pytest.fixture
def client(backend: ScriptedBackend, tokenizer: Tokenizer) -> Iterator[httpx.Client]:
    with serving(pool_of(backend, tokenizer)) as url, httpx.Client(base_url=url) as made:
        yield made


def test_what_llama_vim_sends(client: httpx.Client) -> None:
    """The fields of its requests, and those of the answer that it reads."""
    fields = ["content", "timings/prompt_n", "timings/predicted_per_second", "truncated"]
    sent = {
        "id_slot": 0,
        "input_prefix": "def f():\n",
        "input_suffix": "\n",
        "input_extra": [{"text": "x = 1", "time": [1, 2], "filename": "a.py"}],
        "prompt": "    a = ",
        "n_predict": 128,
        "stop": [],
        "n_indent": 4,
        "top_k": 40,
        "top_p": 0.99,
        "stream": False,
        "samplers": ["top_k", "top_p", "infill"],
        "cache_prompt": True,
        "t_max_prompt_ms": 500,
        "t_max_predict_ms": 1000,
        "response_fields": [*fields, "tokens_cached"],
    }
    found = client.post("/infill", json=sent).json()
    assert found["content"] == "1\n\n    a = 2\n\t"
    assert set(found) == {*fields, "tokens_cached"}
    # To fill the cache with other files: no tokens, no prefix, no suffix.
    ring = {**sent, "input_prefix": "", "input_suffix": "", "prompt": "", "n_predict": 0}
    assert client.post("/infill", json={**ring, "response_fields": [""]}).status_code == 200


@pytest.mark.parametrize(
    ("least", "wanted"),
    [
        (0, FUNCTION),
        (1, "1\n\n    a = 2\n\tb = 3\n  c = 4\n"),
        (2, "1\n\n    a = 2\n\t"),
        (4, "1\n\n    a = 2\n\t"),
        (5, "1\n\n   "),  # " a" is one token
        (9, "1\n\n   "),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_line_with_less_indentation(
    client: httpx.Client, backend: ScriptedBackend, least: int, wanted: str, stream: bool
) -> None:
    sent = {"prompt": "x", "n_indent": least, "stream": stream, "n_probs": 1}
    answer = client.post("/completion", json=sent)
    if stream:
        events = [httpx.Response(200, content=e[6:]).json() for e in answer.text.split("\n\n") if e]
        text, last = "".join(event["content"] for event in events), events[-1]
    else:
        last = answer.json()
        text = last["content"]
        assert len(last["completion_probabilities"]) == last["tokens_predicted"]
    assert text == wanted
    assert last["stop_type"] == ("limit" if least else "eos")
    assert last["timings"]["predicted_n"] == last["tokens_predicted"]
    assert backend.n_running == 0


def test_indentation_goes_by_the_text_however_it_is_cut() -> None:
    for text, short in (
        ("    a\n    b", False),
        ("a\n   b", True),
        ("a\n\n \n    b", False),
        ("a\r\n\r\n    b\n}", True),
        ("a\n\t\t\t\tb", False),
    ):
        whole, pieces = Indentation(4), Indentation(4)
        assert whole.falls_short(text) == short
        assert any(pieces.falls_short(c) for c in text) == short


def test_props_and_slots(client: httpx.Client) -> None:
    assert client.get("/slots").json() == []  # nothing is loaded for it
    found = client.get("/props").json()
    assert found["total_slots"] == 4
    assert found["model_path"] == "scripted"
    assert found["default_generation_settings"]["n_ctx"] == 100
    assert found["default_generation_settings"]["params"]["temperature"] == 0.8
    assert found["bos_token"] == BOS
    assert "add_generation_prompt" in found["chat_template"]
    slots = client.get("/slots").json()
    assert [(slot["id"], slot["n_ctx"], slot["is_processing"]) for slot in slots] == [
        (i, 100, False) for i in range(4)
    ]
    assert client.get("/slots?fail_on_no_slot=1").status_code == 200
    wrong = client.get("/slots?fail_on_no_slot=x")
    assert wrong.status_code == 400
    assert wrong.json()["error"]["message"].startswith("fail_on_no_slot: ")


def test_busy_slots(
    client: httpx.Client, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.get("/props")
    backend.n_running = 3
    slots = client.get("/slots").json()
    assert [slot["is_processing"] for slot in slots] == [True, True, True, False]
    backend.n_running = 4
    assert client.get("/slots?fail_on_no_slot=1").status_code == 503


def test_a_template_can_be_applied_and_counted(client: httpx.Client, tokenizer: Tokenizer) -> None:
    sent = {"messages": [{"role": "system", "content": "s"}, *MESSAGES]}
    found = client.post("/apply-template", json=sent).json()
    assert found == {"prompt": "system:suser:helloassistant:"}
    open_end = client.post("/apply-template", json={**sent, "add_generation_prompt": False})
    assert open_end.json() == {"prompt": "system:suser:hello"}
    counted = client.post("/v1/chat/completions/input_tokens", json={"messages": MESSAGES}).json()
    assert counted["input_tokens"] == len(tokenizer.chat(MESSAGES))
    asked = client.post("/v1/chat/completions", json={"messages": MESSAGES}).json()
    assert asked["usage"]["prompt_tokens"] == counted["input_tokens"]
    for wrong in ({}, {**sent, "tools": [{}]}, {"messages": [{"role": "tool", "content": "x"}]}):
        assert client.post("/apply-template", json=wrong).status_code == 400


def test_settings_come_back_as_they_were_taken(client: httpx.Client) -> None:
    sent = {"prompt": "x", "logit_bias": [["the", 1.5]], "ignore_eos": True}
    found = client.post("/completion", json=sent).json()["generation_settings"]
    biases = {entry["token"]: entry["bias"] for entry in found["logit_bias"]}
    assert biases[token_id("he")] == 1.5
    assert biases[token_id(EOS)] is None  # minus infinity
    assert (
        client.post("/completion", json={"prompt": "x"}).json()["generation_settings"]["logit_bias"]
        == []
    )


@pytest.mark.parametrize("field", [{"n_cmpl": 2}, {"post_sampling_probs": True}])
def test_what_cannot_be_honoured_is_refused(client: httpx.Client, field: dict[str, object]) -> None:
    answer = client.post("/completion", json={"prompt": "x", **field})
    assert answer.status_code == 400
    assert next(iter(field)) in answer.json()["error"]["message"]


def test_an_answer_that_fills_its_context_is_truncated(
    client: httpx.Client, backend: ScriptedBackend
) -> None:
    backend.script = lambda request: [65] * (100 - len(request.prompt_ids))
    full = client.post("/completion", json={"prompt": "x"}).json()
    assert full["truncated"] is False  # the script ended by itself
    asked = client.post("/completion", json={"prompt": "x", "n_predict": 5}).json()
    assert (asked["truncated"], asked["stop_type"]) == (False, "limit")


def test_health_says_in_llama_cpps_way_that_a_model_is_loading(
    client: httpx.Client, backend: ScriptedBackend
) -> None:
    client.get("/props")
    backend.healthy = False
    answer = client.get("/health")
    assert answer.status_code == 503
    assert answer.json()["error"]["type"] == "unavailable_error"


def test_what_curl_sends_without_a_header_is_read_as_json(client: httpx.Client) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    for path, body in (
        ("/v1/completions", b'{"prompt": "x"}'),
        ("/infill", b'{"input_prefix": "x", "input_suffix": "y"}'),
    ):
        assert client.post(path, content=body, headers=form).status_code == 200
        for elsewhere in ("http://elsewhere", "http://["):
            foreign = {**form, "Origin": elsewhere}
            assert client.post(path, content=body, headers=foreign).status_code == 403
