"""The loop over llama.cpp: the same tokens as one request alone, whatever else is going on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsq.errors import DsqError, InputError
from dsq.runtime.generate import generate
from dsq.runtime.llamacpp import LlamaCppEngine
from dsq.runtime.sampling import GREEDY
from dsq.runtime.server.backend import GenerateRequest, PromptTooLong, Sampling, Step
from dsq.runtime.server.llama_batch import LlamaSettings
from dsq.runtime.server.loop import Loop
from tests.tiny_gguf import BOS, EOS, token_id, write_tiny_gguf

PROMPTS = [[token_id(BOS), *range(60 + 3 * i, 90 + 5 * i)] for i in range(6)]
N = 24
LOOPING = [50] * 20  # this model's answer to it repeats itself


@pytest.fixture
def settings(tiny: Path) -> LlamaSettings:
    return LlamaSettings(str(tiny), n_ctx=256, kv_size=1024, n_threads=1, n_draft=0)


@pytest.fixture
def loop(settings: LlamaSettings) -> Iterator[Loop]:
    made = Loop(settings)
    yield made
    made.close()


def _alone(engine: LlamaCppEngine, prompt: Sequence[int], n: int = N) -> tuple[int, ...]:
    made = generate(engine, prompt, max_tokens=n, stop_ids=frozenset(), sampler=GREEDY)
    return made.result.tokens


def _ask(prompt: Sequence[int], n: int = N, **more: object) -> GenerateRequest:
    return GenerateRequest(tuple(prompt), n, **more)  # type: ignore[arg-type]


def _run(loop: Loop, *requests: GenerateRequest, gap: int = 0) -> list[list[Step]]:
    """All steps of each request; `gap` steps go by between one request and the next."""
    steps: dict[int, list[Step]] = {id: [] for id in range(len(requests))}

    def go() -> None:
        for id, step in loop.step():
            assert isinstance(step, Step), step
            steps[id].append(step)

    for id, request in enumerate(requests):
        loop.submit(id, request)
        for _ in range(gap):
            go()
    while not loop.idle:
        go()
    return [steps[id] for id in range(len(requests))]


def _draft_always(loop: Loop) -> None:
    """As where further rows are nearly free."""
    loop._speculation.cost.seconds = lambda rows: 1 + rows / 100  # type: ignore[method-assign]


def _tokens(steps: list[Step]) -> tuple[int, ...]:
    return tuple(token for step in steps for token in step.token_ids)


@pytest.mark.parametrize("gap", [0, 3])
def test_a_batch_gives_each_request_what_it_gets_alone(
    loop: Loop, engine: LlamaCppEngine, gap: int
) -> None:
    """More requests than slots; with a gap they join while others stream."""
    together = _run(loop, *map(_ask, PROMPTS), gap=gap)
    assert [_tokens(s) for s in together] == [_alone(engine, p) for p in PROMPTS]
    assert {s[-1].finish for s in together} == {"length"}


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_a_quantized_cache(tmp_path: Path, settings: LlamaSettings, kv_type: str) -> None:
    wide = write_tiny_gguf(tmp_path / "wide.gguf", n_embd=128)  # heads of 32: one block
    loop = Loop(replace(settings, path=str(wide), kv_type=kv_type))
    together = _run(loop, *map(_ask, PROMPTS))
    loop.close()
    with LlamaCppEngine(wide, n_ctx=256, n_threads=1, kv_type=kv_type) as engine:
        assert [_tokens(s) for s in together] == [_alone(engine, p) for p in PROMPTS]


def test_requests_that_outgrow_the_cache_all_get_done(
    settings: LlamaSettings, engine: LlamaCppEngine
) -> None:
    loop = Loop(replace(settings, kv_size=256))
    together = _run(loop, *(_ask(p, 120) for p in PROMPTS))
    loop.close()
    assert [_tokens(s) for s in together] == [_alone(engine, p, 120) for p in PROMPTS]


def test_drafts_change_nothing_but_the_number_of_steps(
    settings: LlamaSettings, engine: LlamaCppEngine
) -> None:
    expected = _alone(engine, LOOPING, 150)
    loop = Loop(replace(settings, n_draft=16))
    _draft_always(loop)
    steps = _run(loop, _ask(LOOPING, 150), _ask(LOOPING, 150, lookup=False))
    loop.close()
    assert [_tokens(s) for s in steps] == [expected, expected]
    used, plain = steps[0][-1].usage, steps[1][-1].usage
    assert used is not None
    assert plain is not None
    assert (plain.n_drafted, len(steps[1])) == (0, 150)
    assert used.n_accepted == 150 - len(steps[0])
    assert 30 < used.n_accepted <= used.n_drafted


def test_drafts_do_not_change_what_a_seed_samples(settings: LlamaSettings) -> None:
    """Each position is drawn from the model's own logits by the request's own generator."""
    loop = Loop(replace(settings, n_draft=16))
    _draft_always(loop)
    for seed in range(8):
        sampling = Sampling(temperature=1.0, top_k=2, seed=seed)
        drafted, plain = (
            _run(loop, _ask(LOOPING, 40, sampling=sampling, lookup=lookup))[0]
            for lookup in (True, False)
        )
        assert _tokens(drafted) == _tokens(plain)
    assert loop.counters.drafted_tokens > loop.counters.accepted_tokens
    loop.close()


def test_sampling_follows_the_models_probabilities(loop: Loop, engine: LlamaCppEngine) -> None:
    logits = engine.eval(PROMPTS[0]).astype(np.float64)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    n = 600
    seen: Counter[int] = Counter()
    for seed in range(n):
        sampling = Sampling(temperature=1.0, seed=seed)
        seen.update(_tokens(_run(loop, _ask(PROMPTS[0], 1, sampling=sampling))[0]))
    for token in np.argsort(-p)[:8]:
        assert abs(seen[int(token)] - n * p[token]) < 4 * math.sqrt(n * p[token])


def test_logprobs_are_the_models_own(loop: Loop, engine: LlamaCppEngine) -> None:
    prompt = PROMPTS[0]
    steps = _run(loop, _ask(prompt, 4, n_logprobs=3, prompt_logprobs=True))[0]
    whole = [*prompt, *_tokens(steps)]
    logits = engine.logits(whole[:-1]).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    prompt_part = steps[0].prompt_logprobs
    assert prompt_part is not None
    assert prompt_part[0] is None
    assert all(s.prompt_logprobs is None for s in steps[1:])
    found = [*prompt_part[1:], *(t for s in steps for t in s.logprobs or ())]
    assert len(found) == len(whole) - 1
    for i, entry in enumerate(found):
        assert entry is not None
        assert entry.logprob == pytest.approx(expected[i, whole[i + 1]], abs=0.02)
        assert len(entry.top) == 3
        best = np.sort(expected[i])[::-1][:3]
        assert [p for _, p in entry.top] == pytest.approx(list(best), abs=0.02)


def test_the_prefix_of_an_earlier_request_is_used_again(loop: Loop, engine: LlamaCppEngine) -> None:
    edited = [*PROMPTS[5][:40], 61, 62, 63]
    before, after = (_run(loop, _ask(p))[0] for p in (PROMPTS[5], edited))
    assert before[-1].usage is not None
    assert after[-1].usage is not None
    assert (before[-1].usage.n_cached, after[-1].usage.n_cached) == (0, 40)
    assert _tokens(after) == _alone(engine, edited)


def test_a_stop_token_ends_and_is_not_given_out(loop: Loop, engine: LlamaCppEngine) -> None:
    answer = _alone(engine, PROMPTS[1])
    stop = answer[5]
    steps = _run(loop, _ask(PROMPTS[1], stop_ids=frozenset([stop])))[0]
    assert steps[-1].finish == "stop"
    assert _tokens(steps) == answer[: answer.index(stop)]


def test_a_full_context_ends_with_length(loop: Loop) -> None:
    steps = _run(loop, _ask([40] * 250, 100))[0]
    assert (len(_tokens(steps)), steps[-1].finish) == (6, "length")


def test_logit_bias_and_penalties(loop: Loop, engine: LlamaCppEngine) -> None:
    first = _alone(engine, PROMPTS[0])[0]
    forbidden = _run(loop, _ask(PROMPTS[0], 1, logit_bias=((first, -math.inf),)))[0]
    engine.truncate(0)
    assert _tokens(forbidden) == (int(np.argsort(-engine.eval(PROMPTS[0]))[1]),)
    forced = _run(loop, _ask(PROMPTS[0], 5, logit_bias=((77, 1000.0),)))[0]
    assert _tokens(forced) == (77,) * 5
    sampling = Sampling(frequency_penalty=100.0)
    varied = _run(loop, _ask(PROMPTS[0], 5, logit_bias=((77, 50.0),), sampling=sampling))[0]
    assert _tokens(varied).count(77) == (0 if 77 in PROMPTS[0] else 1)


def test_a_grammar_is_kept_and_ends(loop: Loop) -> None:
    stop = frozenset([token_id(EOS)])
    grammar = 'root ::= ("y" | "n") "y" ("y" | "n")'
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=3)):
        request = _ask(PROMPTS[2], 10, grammar=grammar, stop_ids=stop, sampling=sampling)
        steps = _run(loop, request)[0]
        tokens = _tokens(steps)
        assert len(tokens) == 3
        assert set(tokens) <= {ord("y"), ord("n")}
        assert tokens[1] == ord("y")
        assert steps[-1].finish == "stop"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"grammar": "root ::= ("}, "not valid GBNF"),
        ({"grammar": "root ::= root"}, "not valid GBNF.*left recursion"),
        ({"logit_bias": ((5000, 1.0),)}, "token 5000 is outside the model's 293"),
    ],
)
def test_what_the_model_cannot_do_is_refused(
    loop: Loop, more: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        loop.submit(0, _ask(PROMPTS[0], **more))
    assert loop.idle
    assert loop.n_waiting == 0


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("root ::= " + 100_000 * "(" + '"a"' + 100_000 * ")", "500 deep"),
        ("root ::= " + 300_000 * "a", "300009 characters"),
        (" ", "empty"),
        ('root ::= "\udc80"', "surrogate"),
    ],
)
def test_a_grammar_that_would_crash_llama_cpp_is_refused(grammar: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _ask(PROMPTS[0], grammar=grammar)


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(loop: Loop) -> None:
    with pytest.raises(PromptTooLong, match="256 tokens, but a context of 256"):
        loop.submit(0, _ask([40] * 256))


def test_cancelling_frees_the_slot(settings: LlamaSettings, engine: LlamaCppEngine) -> None:
    loop = Loop(replace(settings, n_parallel=1))
    loop.submit(0, _ask(PROMPTS[0], 200))
    loop.step()
    loop.submit(1, _ask(PROMPTS[1]))
    assert (loop.n_running, loop.n_waiting) == (1, 1)
    loop.cancel(0)
    loop.cancel(0)
    tokens: list[int] = []
    while not loop.idle:
        for id, step in loop.step():
            assert id == 1
            assert isinstance(step, Step)
            tokens += step.token_ids
    assert tuple(tokens) == _alone(engine, PROMPTS[1])
    loop.close()


def test_a_failed_batch_ends_who_ran_and_the_next_request_works(
    loop: Loop, engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.submit(0, _ask(PROMPTS[0]))
    loop.step()

    def fail(*_: object) -> None:
        raise DsqError("llama_decode failed (-3)")

    with monkeypatch.context() as patched:
        patched.setattr(loop._llama, "decode", fail)
        [(id, outcome)] = loop.step()
    assert id == 0
    assert isinstance(outcome, DsqError)
    assert loop.idle
    assert loop.kv_used == 0
    assert _tokens(_run(loop, _ask(PROMPTS[0]))[0]) == _alone(engine, PROMPTS[0])
