"""What idle slots hold is out of a long prompt's way, and there again when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from dsq.errors import DsqError
from dsq.runtime.generate import generate
from dsq.runtime.llamacpp import LlamaCppEngine
from dsq.runtime.sampling import GREEDY
from dsq.runtime.server.backend import GenerateRequest, Step
from dsq.runtime.server.llama_batch import LlamaSettings
from dsq.runtime.server.loop import Loop
from tests.tiny_gguf import BOS, token_id, write_tiny_gguf

N = 12
SHORT = [[token_id(BOS), *range(60 + 9 * i, 90 + 9 * i)] for i in range(5)]
LONG = [token_id(BOS), *(40 + i * i % 190 for i in range(200))]


@pytest.fixture(scope="module", params=["f16", "q8_0"])
def kv_type(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32, which a quantized cache needs."""
    return write_tiny_gguf(tmp_path_factory.mktemp("wide") / "wide.gguf", n_embd=128)


@pytest.fixture
def loop(wide: Path, kv_type: str) -> Iterator[Loop]:
    made = Loop(LlamaSettings(str(wide), n_ctx=256, kv_size=512, n_threads=1, kv_type=kv_type))
    yield made
    made.close()


@pytest.fixture(scope="module")
def alone(wide: Path, kv_type: str) -> Iterator[LlamaCppEngine]:
    with LlamaCppEngine(wide, n_ctx=256, n_threads=1, kv_type=kv_type) as engine:
        yield engine


def _ask(loop: Loop, prompt: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Tokens, and how many of the prompt's were cached."""
    loop.submit(0, GenerateRequest(tuple(prompt), N))
    tokens: list[int] = []
    n_cached = 0
    while not loop.idle:
        for _, step in loop.step():
            assert isinstance(step, Step), step
            tokens += step.token_ids
            n_cached = step.usage.n_cached if step.usage else n_cached
    return tuple(tokens), n_cached


def _expected(engine: LlamaCppEngine, prompt: Sequence[int]) -> tuple[int, ...]:
    made = generate(engine, prompt, max_tokens=N, stop_ids=frozenset(), sampler=GREEDY)
    return made.result.tokens


def test_a_long_prompt_finds_the_cache_empty(loop: Loop, alone: LlamaCppEngine) -> None:
    for prompt in SHORT:
        _ask(loop, prompt)
    assert loop._parking is not None
    assert loop._parking.slots == ()
    assert _ask(loop, LONG) == (_expected(alone, LONG), 0)
    assert len(loop._parking.slots) == len(SHORT)
    for prompt in SHORT:  # each is still there
        again = [*prompt, 7, 8]
        assert _ask(loop, again) == (_expected(alone, again), len(prompt))


def test_what_is_evicted_while_parked_is_gone(loop: Loop, alone: LlamaCppEngine) -> None:
    for prompt in SHORT:
        _ask(loop, prompt)
    others = [[token_id(BOS), *(40 + i * i * k % 190 for i in range(230))] for k in (3, 5, 7)]
    for prompt in [LONG, *others, LONG, SHORT[0]]:
        assert _ask(loop, prompt)[0] == _expected(alone, prompt)
    assert loop.kv_used <= loop.kv_size


def test_a_failed_batch_forgets_what_was_parked(
    loop: Loop, alone: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for prompt in (*SHORT, LONG):
        _ask(loop, prompt)

    def fail(*_: object) -> None:
        raise DsqError("llama_decode failed (-3)")

    loop.submit(0, GenerateRequest(tuple(SHORT[0]), N))
    with monkeypatch.context() as patched:
        patched.setattr(loop._llama, "decode", fail)
        assert isinstance(loop.step()[0][1], DsqError)
    assert loop._parking is not None
    assert loop._parking.slots == ()
    for prompt in (SHORT[1], LONG):
        tokens, n_cached = _ask(loop, prompt)
        assert tokens == _expected(alone, prompt)
        assert n_cached <= 1, "BOS"
