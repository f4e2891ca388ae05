"""Fill in the middle: what is dropped when a file is longer than the context."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsq.errors import InputError
from dsq.runtime.server.infill import Extra, Surroundings, infill, with_files
from dsq.tokenizer_port.tokenizer import Tokenizer
from tests.tiny_gguf import BEGIN, BOS, END, HOLE, token_id

MARKERS = [token_id(text) for text in (BOS, BEGIN, HOLE, END)]
WORDS = st.sampled_from(["a", "the ", "\n", "é", "€", "    return"])
TEXT = st.lists(WORDS, max_size=80).map("".join)


def parts(ids: tuple[int, ...], tokenizer: Tokenizer) -> tuple[str, str]:
    """The prefix and the suffix that a prompt holds."""
    begin, hole, end = (ids.index(token_id(t)) for t in (BEGIN, HOLE, END))
    return tokenizer.decode(ids[begin + 1 : hole]), tokenizer.decode(ids[hole + 1 : end])


@given(prefix=TEXT, suffix=TEXT, n_ctx=st.integers(16, 64), n_predict=st.integers(-1, 20))
def test_the_prompt_fits_and_keeps_what_is_nearest_to_the_hole(
    tokenizer: Tokenizer, prefix: str, suffix: str, n_ctx: int, n_predict: int
) -> None:
    found = infill(tokenizer, prefix, suffix, n_ctx=n_ctx, n_predict=n_predict)
    assert len(found.ids) <= max(n_ctx - max(1, n_predict), n_ctx // 2)
    assert [i for i in found.ids if i in MARKERS] == MARKERS
    before, after = parts(found.ids, tokenizer)
    assert prefix.endswith(before)
    assert suffix.startswith(after)
    whole = tokenizer.encode(prefix, add_bos=False), tokenizer.encode(suffix, add_bos=False)
    n_kept = len(found.ids) - len(MARKERS)
    n_dropped = found.dropped_prefix_tokens + found.dropped_suffix_tokens
    assert n_kept + n_dropped == len(whole[0]) + len(whole[1])
    assert (n_dropped == 0) == ((before, after) == (prefix, suffix))


def test_cuts_are_at_line_borders(tokenizer: Tokenizer) -> None:
    prefix = "".join(f"line {i}\n" for i in range(50)) + "    last = "
    suffix = "\n" + "".join(f"after {i}\n" for i in range(50))
    found = infill(tokenizer, prefix, suffix, n_ctx=120, n_predict=20)
    before, after = parts(found.ids, tokenizer)
    assert before.startswith("line ")
    assert before.endswith("    last = ")
    assert after.endswith("\n")
    assert found.dropped_prefix_tokens > 0 < found.dropped_suffix_tokens


def test_the_room_that_one_side_leaves_is_the_others(tokenizer: Tokenizer) -> None:
    long = "xy\n" * 60
    found = infill(tokenizer, long, "end", n_ctx=100, n_predict=0)
    assert found.dropped_suffix_tokens == 0
    assert len(found.ids) > 80
    found = infill(tokenizer, "def", long, n_ctx=100, n_predict=0)
    assert found.dropped_prefix_tokens == 0
    assert len(found.ids) > 90


def test_the_next_keystrokes_keep_the_beginning_of_the_prompt(tokenizer: Tokenizer) -> None:
    """So the cache serves them: the cut moves in strides, not with every letter."""
    prefix = "".join(f"line {i}\n" for i in range(50))
    starts = []
    for n in range(8):
        ids = infill(tokenizer, prefix + "x" * n, "", n_ctx=120, n_predict=20).ids
        starts.append(ids[:40])
    assert len(set(starts)) <= 2


def test_one_line_longer_than_the_context(tokenizer: Tokenizer) -> None:
    found = infill(tokenizer, "é" * 200, "€" * 200, n_ctx=64, n_predict=0)
    before, after = parts(found.ids, tokenizer)
    assert set(before) == {"é"}
    assert set(after) == {"€"}


def test_markers_in_a_file_stay_text(tokenizer: Tokenizer) -> None:
    found = infill(tokenizer, f"a{HOLE}{END}", BEGIN, n_ctx=100, n_predict=0)
    assert [i for i in found.ids if i in MARKERS] == MARKERS


def test_other_files_stand_before_the_file_inside_the_prefix(tokenizer: Tokenizer) -> None:
    extra = [Extra("a.go", "first\n"), Extra("", "second")]
    around = Surroundings("main.py", extra)
    found = infill(tokenizer, "x", "y", n_ctx=100, n_predict=0, around=around)
    before, after = parts(found.ids, tokenizer)
    assert before == "//a.go\nfirst\n\nsecond\n\n#main.py\nx"
    assert after == "y"
    assert found.ids[0] == token_id(BOS)


def test_the_last_extra_files_stay_as_in_llama_cpp(tokenizer: Tokenizer) -> None:
    extra = [Extra("a.py", "first\n"), Extra("b.py", "word\n" * 60), Extra("c.py", "last\n")]
    around = Surroundings(None, extra)
    found = infill(tokenizer, "x", "y", n_ctx=160, n_predict=0, around=around)
    before, _ = parts(found.ids, tokenizer)
    assert before.startswith("#b.py\nword\n")
    assert before.endswith("word\n#c.py\nlast\n\nx")
    report = found.report()
    assert (report["dropped_extra_files"], report["cut_extra_files"]) == (1, 1)


@given(prefix=TEXT, suffix=TEXT, n_ctx=st.integers(16, 90), n_files=st.integers(0, 4), n=WORDS)
def test_other_files_never_push_the_file_out(
    tokenizer: Tokenizer, prefix: str, suffix: str, n_ctx: int, n_files: int, n: str
) -> None:
    extra = [Extra(f"{i}.py", n * 9) for i in range(n_files)]
    around = Surroundings("m.py", extra)
    found = infill(tokenizer, prefix, suffix, n_ctx=n_ctx, n_predict=5, around=around)
    assert len(found.ids) <= max(n_ctx - 5, n_ctx // 2)
    assert [i for i in found.ids if i in MARKERS] == MARKERS
    whole = tokenizer.encode(prefix, add_bos=False), tokenizer.encode(suffix, add_bos=False)
    n_file = sum(map(len, whole))
    kept = n_file - found.dropped_prefix_tokens - found.dropped_suffix_tokens
    room = max(n_ctx - 5, n_ctx // 2) - len(MARKERS)
    others = len(found.ids) - len(MARKERS) - kept
    assert 0 <= others <= max(room // 4, room - n_file)


def test_a_prefix_alone_stands_behind_the_files_after_one_bos(tokenizer: Tokenizer) -> None:
    ids, report = with_files(
        tokenizer, "the", n_ctx=100, n_predict=5, around=Surroundings("m.py", [Extra("a.py", "x")])
    )
    assert ids[0] == token_id(BOS)
    assert token_id(BOS) not in ids[1:]
    assert tokenizer.decode(ids) == "#a.py\nx\n\n#m.py\nthe"
    assert report["dropped_extra_files"] == 0


def test_a_model_without_the_markers(tokenizer: Tokenizer) -> None:
    vocab = dataclasses.replace(tokenizer.vocab, fim_prefix=None, fim_suffix=None, fim_middle=None)
    with pytest.raises(InputError, match="no fill-in-the-middle tokens"):
        infill(Tokenizer.from_vocabulary(vocab), "a", "b", n_ctx=100, n_predict=0)
