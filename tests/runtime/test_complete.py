"""Completion prompts and stops."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from dsq.errors import InputError
from dsq.runtime.complete import complete, completion_ids
from dsq.runtime.source import Source
from dsq.tokenizer_port.tokenizer import Tokenizer
from tests.runtime.scripted import ScriptedEngine
from tests.tiny_gguf import BEGIN, BOS, END, EOS, HOLE, token_id


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer.from_vocabulary(Source(tiny).vocabulary)


def test_fill_in_the_middle_is_begin_prefix_hole_suffix_end(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, [65, token_id(EOS)])
    generation = complete(engine, "the", "x")
    assert generation.result.stop_reason == "eos"
    assert engine.held[:7] == [
        token_id(BOS),
        token_id(BEGIN),
        *(token_id("t"), token_id("he")),
        token_id(HOLE),
        token_id("x"),
        token_id(END),
    ]
    assert generation.text == tokenizer.decode([65])


def test_an_empty_suffix_is_still_fill_in_the_middle(tokenizer: Tokenizer) -> None:
    ids = completion_ids(tokenizer, "", "")
    assert ids == [token_id(t) for t in (BOS, BEGIN, HOLE, END)]


def test_plain_completion(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, [66, 67, token_id(EOS)])
    found = complete(engine, "the", stop_strings=("zz",)).result
    assert engine.held == [token_id(BOS), token_id("t"), token_id("he"), 66, 67]
    assert found.tokens == (66, 67)


def test_markers_in_the_users_text_stay_text(tokenizer: Tokenizer) -> None:
    ids = completion_ids(tokenizer, f"a{HOLE}b{EOS}", "c")
    assert ids.count(token_id(HOLE)) == 1
    assert token_id(EOS) not in ids


def test_nothing_to_complete(tokenizer: Tokenizer) -> None:
    without_bos = Tokenizer.from_vocabulary(dataclasses.replace(tokenizer.vocab, add_bos=False))
    with pytest.raises(InputError, match="nothing to complete"):
        completion_ids(without_bos, "")


def test_a_model_without_fill_in_the_middle(tokenizer: Tokenizer) -> None:
    plain = Tokenizer.from_vocabulary(dataclasses.replace(tokenizer.vocab, fim_suffix=None))
    with pytest.raises(InputError, match="fill-in-the-middle"):
        completion_ids(plain, "a", "b")
