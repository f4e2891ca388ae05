"""Generation: greedy truth, stop reasons, stop strings, whole characters."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from dsq.errors import InputError
from dsq.runtime.generate import Generation, generate
from dsq.runtime.llamacpp import LlamaCppEngine
from dsq.runtime.sampling import GREEDY, SamplerSettings
from dsq.runtime.source import Source
from dsq.tokenizer_port.tokenizer import Tokenizer
from tests.runtime.scripted import ScriptedEngine
from tests.tiny_gguf import EOS, EOT, token_id

PROMPT = [65, 66, 67]
EOS_ID = token_id(EOS)


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer.from_vocabulary(Source(tiny).vocabulary)


def scripted(
    tokenizer: Tokenizer, text: str, *, stops: tuple[str, ...] = (), max_tokens: int = 50
) -> Generation:
    """One token a byte, so that stop strings and characters fall across tokens; then EOS."""
    letters = [tokenizer.encode(chr(b), add_bos=False)[0] for b in text.encode() if b < 128]
    ids = byte_ids(tokenizer, text.encode()) if len(letters) < len(text.encode()) else letters
    engine = ScriptedEngine(tokenizer, [*ids, EOS_ID])
    return generate(
        engine,
        PROMPT,
        max_tokens=max_tokens,
        stop_ids={EOS_ID},
        stop_strings=stops,
        sampler=GREEDY,
    )


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    table = {tokenizer.token_bytes(i): i for i in range(256)}
    return [table[bytes([b])] for b in data]


def test_greedy_equals_the_argmax_of_whole_evaluations(engine: LlamaCppEngine) -> None:
    prompt = engine.tokenizer.encode("def f(self):")
    generation = generate(engine, prompt, max_tokens=12, stop_ids=frozenset(), sampler=GREEDY)
    text = "".join(generation)
    ids = list(prompt)
    for _ in range(12):
        ids.append(int(engine.logits(ids)[-1].argmax()))
    assert generation.result.tokens == tuple(ids[len(prompt) :])
    assert text == generation.result.text
    assert generation.result.prompt_tokens == len(prompt)
    assert generation.result.stop_reason == "length"
    assert generation.result.tokens_per_second > 0


def test_a_stop_token_ends_it_and_is_not_part_of_it(engine: LlamaCppEngine) -> None:
    greedy = generate(engine, PROMPT, max_tokens=8, stop_ids=frozenset(), sampler=GREEDY).result
    stop = greedy.tokens[3]
    before = greedy.tokens[: greedy.tokens.index(stop)]
    found = generate(engine, PROMPT, max_tokens=8, stop_ids={stop}, sampler=GREEDY).result
    assert found.tokens == before
    assert found.stop_reason == "eos"


def test_the_context_ends_it(tiny: Path) -> None:
    with LlamaCppEngine(tiny, n_ctx=8, n_threads=1) as small:
        found = generate(small, PROMPT, max_tokens=99, stop_ids=frozenset(), sampler=GREEDY).result
    assert found.stop_reason == "context"
    assert len(found.tokens) == 8 - len(PROMPT) + 1  # the last one needs no place of its own


def test_stop_strings_across_tokens(tokenizer: Tokenizer) -> None:
    generation = scripted(tokenizer, "abc END def", stops=("END", "zzz"))
    assert "".join(generation) == "abc "
    assert generation.result.stop_reason == "stop"
    assert generation.result.text == "abc "


def test_the_first_of_several_stop_strings_counts(tokenizer: Tokenizer) -> None:
    assert scripted(tokenizer, "a\n\nb\nc", stops=("b", "\n\n")).result.text == "a"


def test_text_that_only_looks_like_a_stop_string_comes_out(tokenizer: Tokenizer) -> None:
    generation = scripted(tokenizer, "a ENENE", stops=("END",))
    pieces = list(generation)
    assert pieces == ["a", " ", "EN", "EN", "E"]  # held back while it may become one
    assert generation.result.stop_reason == "eos"


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_half_a_character_never_comes_out(tokenizer: Tokenizer, limit: int) -> None:
    """日 is three bytes, one token each."""
    generation = scripted(tokenizer, "日!", max_tokens=limit)
    assert list(generation) == ["日", "!"][: max(0, limit - 2)]
    assert len(generation.result.tokens) == limit


def test_bytes_that_are_no_text_become_replacement_characters(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, [*byte_ids(tokenizer, b"a\xe6b\xe6"), EOS_ID])
    found = generate(engine, PROMPT, max_tokens=9, stop_ids={EOS_ID}, sampler=GREEDY).result
    assert found.text == "a\ufffdb\ufffd"


def test_special_tokens_are_not_text(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, [65, token_id(EOT), 66, EOS_ID])
    found = generate(engine, PROMPT, max_tokens=9, stop_ids={EOS_ID}, sampler=GREEDY).result
    assert found.text == tokenizer.decode([65, 66])
    assert found.tokens == (65, token_id(EOT), 66)


def test_an_interruption_keeps_what_came(tokenizer: Tokenizer) -> None:
    def script() -> object:
        yield from (65, 66)
        raise KeyboardInterrupt

    engine = ScriptedEngine(tokenizer, script())  # type: ignore[arg-type]
    generation = generate(engine, PROMPT, max_tokens=9, stop_ids={EOS_ID}, sampler=GREEDY)
    with pytest.raises(KeyboardInterrupt):
        list(generation)
    assert generation.tokens == [65, 66]
    assert generation.text == tokenizer.decode([65, 66])
    with pytest.raises(RuntimeError, match="interrupted"):
        _ = generation.result


def test_prompts_that_do_not_fit_are_refused_before_any_work(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, itertools.repeat(65), n_ctx=10)
    options = {"max_tokens": 5, "stop_ids": {EOS_ID}, "sampler": GREEDY}
    with pytest.raises(InputError, match="prompt has 10 tokens, but a context of 10 holds at most"):
        generate(engine, [65] * 10, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="prompt is empty"):
        generate(engine, [], **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_tokens is 0"):
        generate(engine, PROMPT, max_tokens=0, stop_ids=set(), sampler=GREEDY)
    with pytest.raises(InputError, match="stop string is empty"):
        generate(engine, PROMPT, stop_strings=["a", ""], **options)  # type: ignore[arg-type]
    assert engine.evaluated == []
    assert len(generate(engine, [65] * 9, **options).result.tokens) == 2  # type: ignore[arg-type]


def test_reuse_evaluates_less_and_says_the_same(engine: LlamaCppEngine) -> None:
    options = {"max_tokens": 6, "stop_ids": frozenset[int](), "sampler": GREEDY}
    first = generate(engine, PROMPT, **options).result  # type: ignore[arg-type]
    again = generate(engine, PROMPT, reuse=True, **options).result  # type: ignore[arg-type]
    assert again.tokens == first.tokens


def test_seeds_repeat(engine: LlamaCppEngine) -> None:
    def tokens(seed: int) -> tuple[int, ...]:
        settings = SamplerSettings(temp=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=seed)
        made = generate(engine, PROMPT, max_tokens=20, stop_ids=frozenset(), sampler=settings)
        return made.result.tokens

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
