"""The texts that tokenizers are compared on: what is in them, and that they come back the same."""

from __future__ import annotations

import dataclasses
import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsq.tokenizer_port.bytelevel import BYTE_TO_CHAR
from dsq.tokenizer_port.corpus import corpus
from dsq.tokenizer_port.corpus_prose import DECOMPOSED
from dsq.tokenizer_port.corpus_source import SOURCE
from dsq.tokenizer_port.fuzz import NEW, WHITE, _cut, random_texts, seams
from dsq.tokenizer_port.vocabulary import TokenType, Vocabulary

from .conftest import ADDED

WHITE_SPACE = [c for c in map(chr, range(0x10000)) if c.isspace() and c not in "\x1c\x1d\x1e\x1f"]


def with_token(vocab: Vocabulary, raw: bytes) -> Vocabulary:
    token = "".join(BYTE_TO_CHAR[byte] for byte in raw)
    return dataclasses.replace(vocab, tokens=(*vocab.tokens, token), types=(*vocab.types, 1))


def test_what_the_corpus_holds(vocab: Vocabulary) -> None:
    texts = corpus(vocab)
    whole = "".join(texts)
    assert len(SOURCE) >= 20
    assert set(SOURCE.values()) <= set(texts)
    assert set(map(chr, range(0x20))) | set(map(chr, range(0x7F, 0xA0))) <= set(whole)
    assert set("\u0085\u2028\u2029\u200b\u200d\ufeff\ue000\U0010ffff") <= set(whole)
    assert all(run in whole for run in (" " * 300, "\t" * 30, "\r\n\r\n", "\n" * 20))
    scripts = {unicodedata.name(char).split()[0] for char in whole if char.isalpha()}
    assert {"LATIN", "CJK", "CYRILLIC", "HANGUL", "ARABIC", "THAI", "DEVANAGARI"} <= scripts
    assert {unicodedata.category(char) for char in whole} >= {"Mn", "Mc", "Me", "So", "Co", "Cn"}


def test_one_text_alone_is_not_normal(vocab: Vocabulary) -> None:
    """llama.cpp never normalizes: a second one would fail `dsq verify` of the families that do."""
    odd = [text for text in corpus(vocab) if unicodedata.normalize("NFC", text) != text]
    assert odd == [DECOMPOSED]


def test_every_added_token_stands_inside_text(vocab: Vocabulary) -> None:
    many = tuple(f"<|x{i}|>" for i in range(300))
    larger = dataclasses.replace(
        vocab,
        tokens=vocab.tokens + many,
        types=vocab.types + (int(TokenType.CONTROL),) * len(many),
    )
    texts = corpus(larger)
    for token in (*ADDED, *many):
        assert any(f"a {token} b{token}{token}\n" in text for text in texts)


def test_random_texts_are_those_of_their_seed(vocab: Vocabulary) -> None:
    first = list(random_texts(300, 7, vocab))
    assert first == list(random_texts(300, 7, vocab))
    assert first[:100] == list(random_texts(100, 7, vocab))
    assert not set(first) & set(filter(lambda t: len(t) > 20, random_texts(300, 8, vocab)))


def test_what_random_texts_hold(vocab: Vocabulary) -> None:
    texts = list(random_texts(2000, 0, vocab))
    whole = "".join(texts)
    assert len(texts) == 2000
    assert whole.encode().decode() == whole  # no lone surrogate
    assert set(WHITE_SPACE) | {"\u200b", "\0", "\x1c", "\ud7ff", "\ue000", "\U0010ffff"} <= set(
        whole
    )
    assert len(set(whole) & set(NEW)) > 300
    kinds = {unicodedata.category(char) for char in whole}
    assert kinds >= {"Cn", "Co", "Cc", "Cf", "Lt", "Lm", "Lo", "Mn", "Nd", "Nl", "No", "Zl", "Zp"}
    assert all(any(token in text for text in texts) for token in ADDED)
    assert "\r\n" in whole
    assert any(" " * 9 in text for text in texts)


def test_a_seam_is_text_that_a_token_tears(vocab: Vocabulary) -> None:
    found = seams(with_token(with_token(vocab, b"\x89s"), b"=\xe2\x80"))
    assert "\u2009s" in found.white
    assert "=\u2028" in found.white
    assert "\U000105c9s" in found.new
    assert {text[0] for text in found.white if text.endswith("s")} == {"\u2009"}
    assert all(char in WHITE for text in found.white for char in text if char not in "s=")
    assert any("\u2009s" in text for text in random_texts(3000, 0, with_token(vocab, b"\x89s")))


@settings(max_examples=300, deadline=None, database=None)
@given(text=st.text(max_size=4), data=st.data())
def test_where_a_token_is_torn(text: str, data: st.DataObject) -> None:
    """Any slice of UTF-8: the end of a character, whole characters, the beginning of one."""
    raw = text.encode(errors="ignore")
    borders = [len(text[:i].encode(errors="ignore")) for i in range(len(text) + 1)]
    first = data.draw(st.integers(0, len(raw)))
    last = data.draw(st.integers(first, len(raw)))
    start, end = _cut(raw[first:last])
    within = [(a, b) for a, b in pairwise(borders) if first <= a < b <= last]
    if within:
        assert (first + start, first + end) == (within[0][0], within[-1][1])
    else:
        assert start >= end


@pytest.mark.parametrize("n", [0, 1])
def test_few(n: int) -> None:
    assert len(list(random_texts(n))) == n
