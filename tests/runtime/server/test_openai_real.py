"""OpenAI's client against the whole server: HTTP, the worker process, llama.cpp, a tiny model.

Greedy answers are held against the engine asked directly, logprobs against its logits.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from dsq.runtime.complete import complete
from dsq.runtime.llamacpp import LlamaCppEngine
from dsq.runtime.server.client import WorkerBackend
from dsq.runtime.server.llama_batch import LlamaSettings
from dsq.runtime.server.models import ModelPool, Offer
from dsq.tokenizer_port.tokenizer import Tokenizer
from tests.runtime.server.scripted_backend import serving
from tests.tiny_gguf import BOS, token_id

PROMPT = "def f(self):"
CHAT: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client(tiny: Path, tokenizer: Tokenizer) -> Iterator[openai.OpenAI]:
    settings = LlamaSettings(str(tiny), n_ctx=256, kv_size=1024, n_threads=1)
    pool = ModelPool(
        {"tiny": Offer(tiny, 1)}, lambda _: WorkerBackend(settings), lambda _: tokenizer
    )
    with (
        serving(pool) as url,
        httpx.Client(verify=False) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, http_client=http) as made,
    ):
        yield made


def ask(client: openai.OpenAI, **how: Any) -> Any:
    return client.completions.create(
        **{"model": "x", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **how}
    )


def chat(client: openai.OpenAI, **how: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "x", "messages": CHAT, "max_tokens": 12, "temperature": 0, **how}
    )


def logprobs_of(engine: LlamaCppEngine, ids: Sequence[int]) -> np.ndarray:
    """Row i: of every token to come after ids[: i + 1]."""
    logits = np.asarray(engine.logits(list(ids)), dtype=np.float64)
    top = logits.max(axis=1, keepdims=True)
    found: np.ndarray = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    return found


def joined(chunks: Sequence[Any]) -> dict[int, str]:
    texts: dict[int, str] = defaultdict(str)
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += getattr(choice, "text", None) or (
                choice.delta.content or "" if hasattr(choice, "delta") else ""
            )
    return dict(texts)


@pytest.mark.parametrize(
    ("make", "how", "n"),
    [(ask, {"prompt": ["def", "for x in", "if"], "n": 2}, 6), (chat, {"n": 3}, 3)],
)
def test_several_answers_stream_as_they_come_whole(
    client: openai.OpenAI, make: Any, how: dict[str, Any], n: int
) -> None:
    whole = make(client, **how)
    texts = [c.text if make is ask else c.message.content for c in whole.choices]
    assert len(set(texts)) == n // how["n"]  # greedy: one for each prompt
    chunks = list(make(client, **how, stream=True, stream_options={"include_usage": True}))
    assert joined(chunks) == dict(enumerate(texts))
    ends = [c.choices[0] for c in chunks if c.choices and c.choices[0].finish_reason]
    assert sorted(choice.index for choice in ends) == list(range(n))
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    last = chunks[-1]
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens == 12 * n
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens


@pytest.mark.parametrize("make", [ask, chat])
def test_each_of_several_answers_has_a_seed_of_its_own(client: openai.OpenAI, make: Any) -> None:
    found = make(client, n=4, temperature=1, seed=7).choices
    assert len({c.text if make is ask else c.message.content for c in found}) == 4


def test_without_include_usage_there_is_none(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_and_logprobs_are_the_models_own(
    client: openai.OpenAI, engine: LlamaCppEngine, tokenizer: Tokenizer, stream: bool
) -> None:
    found = ask(client, echo=True, logprobs=3, stream=stream, max_tokens=5)
    parts = [c.choices[0] for c in found] if stream else [found.choices[0]]
    text = "".join(part.text for part in parts)
    assert text.startswith(PROMPT)
    tokens = [t for part in parts for t in part.logprobs.tokens]
    values = [v for part in parts for v in part.logprobs.token_logprobs]
    tops = [t for part in parts for t in part.logprobs.top_logprobs]
    prompt = tokenizer.encode(PROMPT)
    made = complete(engine, PROMPT, None, max_tokens=5).result.tokens
    ids = [*prompt, *made]
    assert len(tokens) == len(ids)
    assert tokens[0] == BOS
    engine.truncate(0)
    wanted = logprobs_of(engine, ids)
    chosen = [wanted[i, ids[i + 1]] for i in range(len(ids) - 1)]
    assert values[0] is None
    assert np.allclose(values[1:], chosen, atol=2e-3)
    for row, top in zip(wanted[len(prompt) - 1 :], tops[len(prompt) :], strict=False):
        assert np.allclose(sorted(top.values()), np.sort(row)[-len(top) :], atol=2e-3)


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs_are_the_models_own(
    client: openai.OpenAI, engine: LlamaCppEngine, tokenizer: Tokenizer, stream: bool
) -> None:
    found = chat(client, logprobs=True, top_logprobs=4, stream=stream)
    parts = [c.choices[0] for c in found] if stream else [found.choices[0]]
    entries = [e for part in parts if part.logprobs for e in part.logprobs.content]
    row = logprobs_of(engine, tokenizer.chat(CHAT))[-1]
    best = np.argsort(row)[::-1][:4]
    assert entries[0].bytes == list(tokenizer.token_bytes(int(best[0])))
    assert np.isclose(entries[0].logprob, row[best[0]], atol=2e-3)
    assert np.allclose([t.logprob for t in entries[0].top_logprobs], row[best], atol=2e-3)
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in entries)  # greedy
    assert len(entries) == 12


def test_a_suffix_streams_what_the_engine_fills_in(
    client: openai.OpenAI, engine: LlamaCppEngine
) -> None:
    wanted = complete(engine, PROMPT, "return", max_tokens=12).result.text
    assert joined(list(ask(client, suffix="return", stream=True))) == {0: wanted}
    two = ask(client, suffix="return", n=2)
    assert [choice.text for choice in two.choices] == [wanted, wanted]


def test_best_of_is_n_or_refused(client: openai.OpenAI) -> None:
    assert len(ask(client, n=2, best_of=2).choices) == 2
    with pytest.raises(openai.BadRequestError, match="best_of is 3.*takes only n, which is 2"):
        ask(client, n=2, best_of=3)


@pytest.mark.parametrize("stream", [False, True])
def test_a_json_schema_is_kept_in_a_stream_too(client: openai.OpenAI, stream: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "size": {"enum": ["small", "large"]}},
        "required": ["ok", "size"],
    }
    named = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    how = {"response_format": named, "temperature": 1, "seed": 3, "max_tokens": 150}
    found = chat(client, **how, stream=stream)
    text = joined(list(found))[0] if stream else found.choices[0].message.content
    answer = json.loads(text)
    assert isinstance(answer.pop("ok"), bool)
    assert answer in ({"size": "small"}, {"size": "large"})


def test_a_seed_makes_an_answer_again(client: openai.OpenAI) -> None:
    def text(seed: int) -> str:
        made: str = ask(client, temperature=1, seed=seed, max_tokens=24).choices[0].text
        return made

    text(5)  # from now on the prompt is cached; where it is not, the last bits can differ
    assert text(5) == text(5)
    assert len({text(seed) for seed in range(4)}) == 4


def test_a_bias_forbids_and_forces_tokens(
    client: openai.OpenAI, engine: LlamaCppEngine, tokenizer: Tokenizer
) -> None:
    first = ask(client, max_tokens=1, logprobs=0).choices[0].logprobs.tokens[0]
    id = int(np.argmax(engine.logits(tokenizer.encode(PROMPT))[-1]))
    other = ask(client, max_tokens=1, logprobs=0, logit_bias={str(id): -100}).choices[0]
    assert other.logprobs.tokens[0] != first
    forced = ask(client, max_tokens=6, logit_bias={str(token_id("a")): 100})
    assert forced.choices[0].text == "aaaaaa"


def test_stops_at_whichever_comes_first(client: openai.OpenAI) -> None:
    plain = ask(client, max_tokens=20).choices[0].text
    early, late = plain[3:5], plain[8:11]
    for stops in ([late, early], [early, late]):
        found = ask(client, max_tokens=20, stop=stops).choices[0]
        assert found.text == plain.partition(early)[0]
        assert found.finish_reason == "stop"


def test_what_a_grammar_and_a_bias_forbid_together_ends_the_answer(client: openai.OpenAI) -> None:
    sent = {"prompt": "x", "grammar": "root ::= [a]", "logit_bias": {"a": False}, "n_predict": 4}
    root = str(client.base_url).removesuffix("/v1/")
    key = {"Authorization": f"Bearer {client.api_key}"}
    for temperature in (0.0, 1.0):
        answer = httpx.post(
            f"{root}/completion", json={**sent, "temperature": temperature}, headers=key
        )
        assert answer.status_code == 200
        assert "a" not in answer.json()["content"]
    assert httpx.get(f"{root}/health", headers=key).status_code == 200
