"""A draft model changes the speed and nothing else: not greedy text, not a seed's, no odds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from dsq.errors import InputError
from dsq.runtime.generate import generate
from dsq.runtime.llamacpp import LlamaCppEngine
from dsq.runtime.sampling import GREEDY
from dsq.runtime.server.backend import GenerateRequest, Sampling, Step
from dsq.runtime.server.draft_check import check_draft
from dsq.runtime.server.llama_batch import LlamaSettings
from dsq.runtime.server.loop import Loop
from dsq.runtime.server.token_sampler import TokenSampler
from tests.tiny_gguf import BOS, tiny_tokens, token_id, write_tiny_gguf

PROMPTS = [[token_id(BOS), *range(60 + 3 * i, 90 + 5 * i)] for i in range(5)]
N = 40
P = np.array([0.05, 0.4, 0.3, 0.2, 0.05])
Opened = Callable[[Path], Loop]


@pytest.fixture
def opened(tiny: Path) -> Iterator[Opened]:
    """A loop over the tiny model beside a draft model, where drafts always pay."""
    loops: list[Loop] = []

    def make(draft: Path) -> Loop:
        settings = LlamaSettings(
            str(tiny), n_ctx=256, kv_size=1024, n_threads=1, n_draft=0, draft_path=str(draft)
        )
        loop = Loop(settings)
        loop._speculation.cost.seconds = lambda rows: 1 + rows / 100  # type: ignore[method-assign]
        loops.append(loop)
        return loop

    yield make
    for loop in loops:
        loop.close()


def _run(loop: Loop, requests: Sequence[GenerateRequest]) -> tuple[list[tuple[int, ...]], int]:
    """Each request's tokens, and the steps that all took."""
    tokens: dict[int, list[int]] = {id: [] for id in range(len(requests))}
    n_steps = 0
    for id, request in enumerate(requests):
        loop.submit(id, request)
    while not loop.idle:
        n_steps += 1
        for id, step in loop.step():
            assert isinstance(step, Step), step
            tokens[id] += step.token_ids
    return [tuple(t) for t in tokens.values()], n_steps


def test_greedy_text_is_the_large_models_own(
    opened: Opened, tiny: Path, other: Path, engine: LlamaCppEngine
) -> None:
    alone = [
        generate(engine, p, max_tokens=N, stop_ids=frozenset(), sampler=GREEDY).result.tokens
        for p in PROMPTS
    ]
    requests = [GenerateRequest(tuple(p), N) for p in PROMPTS]
    itself, stranger = opened(tiny), opened(other)
    found, n_steps = _run(itself, requests)
    assert found == alone
    assert n_steps < N, "a model agrees with itself"
    assert itself.counters.accepted_tokens > 0.9 * itself.counters.drafted_tokens > 0
    found, _ = _run(stranger, requests)
    assert found == alone
    assert stranger.counters.accepted_tokens < 0.2 * stranger.counters.drafted_tokens


def test_a_seed_gives_the_same_with_and_without_drafts(opened: Opened, other: Path) -> None:
    loop = opened(other)
    for sampling in (
        Sampling(temperature=1.0, seed=3),
        Sampling(temperature=3.0, top_k=9, seed=4, repeat_penalty=1.2),
        Sampling(temperature=0.0, frequency_penalty=0.5),
    ):
        with_, without = (
            [GenerateRequest(tuple(p), N, sampling, lookup=lookup) for p in PROMPTS]
            for lookup in (True, False)
        )
        before = loop.counters.drafted_tokens
        assert _run(loop, with_)[0] == _run(loop, without)[0]
        assert loop.counters.drafted_tokens > before
    assert 0 < loop.counters.accepted_tokens < loop.counters.drafted_tokens


def test_prefixes_and_a_full_cache_do_not_confuse_it(
    opened: Opened, tiny: Path, engine: LlamaCppEngine
) -> None:
    loop = opened(tiny)
    for n in (200, 30, 120, 200):
        prompt = [token_id(BOS), *(40 + i * i % 190 for i in range(n))]
        alone = generate(engine, prompt, max_tokens=N, stop_ids=frozenset(), sampler=GREEDY)
        assert _run(loop, [GenerateRequest(tuple(prompt), N)] * 4)[0] == [alone.result.tokens] * 4
    assert loop.counters.accepted_tokens > 0.9 * loop.counters.drafted_tokens > 0


def _chi_square(seen: Counter[int], n: int, p: npt.NDArray[np.float64]) -> float:
    return float(sum((seen[i] - n * q) ** 2 / (n * q) for i, q in enumerate(p)))


def _sampler(seed: int) -> TokenSampler:
    request = GenerateRequest((1,), 9, Sampling(temperature=1.0, seed=seed))
    return TokenSampler(request, None, len(P), coupled=True)


def test_what_is_sampled_follows_the_probabilities() -> None:
    """Over the seeds, and over the positions of one seed. 99.99 % of such sums are below 23.5."""
    logits, n = np.log(P).astype(np.float32), 4000
    first, one = Counter[int](), _sampler(7)
    for seed in range(n):
        sampler = _sampler(seed)
        first[sampler.sample(logits, None, 0) or 0] += 1
        sampler.close()
    along = Counter(one.sample(logits, None, 0) or 0 for _ in range(n))
    one.close()
    assert _chi_square(first, n, P) < 23.5
    assert _chi_square(along, n, P) < 23.5


def test_models_that_agree_draw_the_same_tokens() -> None:
    """At least (1 - d) / (1 + d) of them, d being the total variation distance."""
    large, small = P, np.array([0.15, 0.4, 0.2, 0.15, 0.1])
    distance = np.abs(large - small).sum() / 2
    n = agreed = 0
    for seed in range(2000):
        sampler = _sampler(seed)
        guess = sampler.fork()
        agreed += guess.sample(np.log(small).astype(np.float32), None, 0) == sampler.sample(
            np.log(large).astype(np.float32), None, 0
        )
        n += 1
        guess.close()
        sampler.close()
    assert agreed / n > (1 - distance) / (1 + distance) - 0.03
    assert agreed / n < 1 - distance + 0.03, "no coupling can do better"


def test_a_draft_of_another_vocabulary_or_rope_is_refused(tmp_path: Path, tiny: Path) -> None:
    names = tiny_tokens()
    names[1], names[2] = names[2], names[1]
    words = write_tiny_gguf(tmp_path / "words.gguf", tokens=names)
    rope = write_tiny_gguf(tmp_path / "rope.gguf", rope=("linear", 2.0))
    short = write_tiny_gguf(tmp_path / "short.gguf", n_ctx=128)
    check_draft(tiny, tiny, 512)
    with pytest.raises(InputError, match=r"words.gguf.*token 1 is 'Ă', but tiny.gguf"):
        check_draft(tiny, words, 512)
    with pytest.raises(InputError, match=r"rope.gguf.*factor 2.*tiny.gguf.*factor 4"):
        check_draft(tiny, rope, 512)
    check_draft(tiny, short, 128)
    with pytest.raises(InputError, match=r"short.gguf.*128 tokens.*512"):
        check_draft(tiny, short, 512)


def test_its_file_is_looked_at_before_anything_runs(tiny: Path) -> None:
    settings = LlamaSettings(str(tiny), n_ctx=256, n_threads=1)
    with pytest.raises(InputError, match="no such file"):
        Loop(replace(settings, draft_path="/nowhere.gguf"))
