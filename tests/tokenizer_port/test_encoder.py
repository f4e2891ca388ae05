"""Piece by piece or whole, the tokens are those of the tokenizers library alone."""

from __future__ import annotations

import json
import random
import re
import threading
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsq.errors import InputError
from dsq.tokenizer_port import encoder as module
from dsq.tokenizer_port.bytelevel import CHAR_TO_BYTE
from dsq.tokenizer_port.encoder import Encoder
from dsq.tokenizer_port.tokenizer import Tokenizer
from dsq.tokenizer_port.vocabulary import Vocabulary

from .conftest import EOT, LETTERS, added_entry, trained

FAMILIES = module._CUTTABLE

PROFILE = settings(
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

# Weighted to where a cut may be wrong: beside letters, digits, spaces, marks, and at their seams.
FRAGMENTS = st.sampled_from(
    (
        *("a", "def", "x1", "12", "123456", "Z", "'s", "'LL", "it's", "'\u017f", "9a9"),
        *(" ", "  ", "\t", "\n", "\n\n", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u00a0"),
        *(".", "(", ")(", "_", "__", "=", "+=", "<|", "|>", "`", "$", "\\", "\x00", "\x7f"),
        *("é", "e\u0301", "\u0301", "ü", "\u212b", "\u037e", "\u212a", "中", "中文", "。", "，"),
        *("가", "ᄀ", "ࠀ", "٣", "²", "½", "🙂", "👩\u200d💻", "\u200d", "\ue000", "“", "…"),
        *("\ufffd", "\u3000", "\u2028"),
    )
)
TEXTS = st.lists(
    FRAGMENTS | st.text(st.characters(max_codepoint=127), max_size=4) | st.text(max_size=3),
    max_size=14,
).map("".join)
TEXTS = TEXTS.filter(lambda text: not any("\ud800" <= char <= "\udfff" for char in text))


@pytest.fixture(scope="module")
def definitions() -> dict[str, dict[str, Any]]:
    return {family: trained(family, 500) for family in FAMILIES}


def library(definition: dict[str, Any]) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(definition))


def alone(definition: dict[str, Any], text: str) -> list[int]:
    found: list[int] = library(definition).encode(text, add_special_tokens=False).ids
    return found


def pre_tokens(tokenizer: tokenizers.Tokenizer, text: str) -> list[str]:
    normalizer = tokenizer.normalizer
    text = normalizer.normalize_str(text) if normalizer else text
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cut_is_the_familys_own(family: str, definitions: Any) -> None:
    """What the library cuts from each piece is what it cuts from the text."""
    theirs = library(definitions[family])
    linewise = family in module._LINEWISE

    @PROFILE
    @given(text=TEXTS)
    def check(text: str) -> None:
        pieces = module._PIECE.findall(text)
        assert "".join(pieces) == text
        chunks = re.split("(?=[\r\n])", text) if linewise else [text]
        for parts in (pieces, chunks):
            assert [w for p in parts for w in pre_tokens(theirs, p)] == pre_tokens(theirs, text)

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_librarys_tokens(
    family: str, definitions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    definition = definitions[family]
    theirs = library(definition)
    small = {"_CHUNK": 3, "_LONGEST": 40, "_MOST_SEEN": 20}
    ours = Encoder(definition)
    assert ours._cut is not None

    @PROFILE
    @given(text=TEXTS)
    def check(text: str) -> None:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        with monkeypatch.context() as patch:
            for name, value in small.items():
                patch.setattr(module, name, value)
            assert Encoder.encode(ours, text) == ids

    check()


@PROFILE
@given(text=st.text(st.characters(max_codepoint=127), max_size=60))
def test_deepseeks_words_in_one_regex(deepseek_json: dict[str, Any], text: str) -> None:
    """One regex finds in ASCII what the five splits cut, one after another."""
    splits = library(deepseek_json).pre_tokenizer.pre_tokenize_str(text)
    cut = [bytes(CHAR_TO_BYTE[c] for c in piece).decode() for piece, _ in splits]
    assert module._DEEPSEEK_WORD.findall(text) == cut


@pytest.mark.parametrize("family", ["deepseek-coder", "gpt-2", "qwen2"])
@pytest.mark.parametrize(
    "added",
    [
        "foo",  # within a piece
        "a b",  # over a cut
        "foo>",
        "<foo",
        "x\ny",
        "中a",
        "Ka(b",  # also where NFC makes the K
        "é",
        {"content": "foo", "lstrip": True},
        {"content": "foo", "rstrip": True},
        {"content": "foo", "single_word": True},
    ],
)
def test_added_tokens(family: str, added: Any, definitions: Any) -> None:
    entry = added if isinstance(added, dict) else {"content": added}
    vocab = definitions[family]["model"]["vocab"]
    token = {**added_entry(len(vocab), entry["content"], special=False), **entry}
    definition = {**definitions[family], "added_tokens": [token]}
    ours, theirs = Encoder(definition), library(definition)
    content = entry["content"]
    around = st.sampled_from((" ", "a", "(", "\n", "foo", "a b", "\u212aa(b", "\u037e", "K", "中"))
    parts = st.lists(around | st.just(content), max_size=8).map("".join)

    @PROFILE
    @given(text=parts)
    def check(text: str) -> None:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids

    check()


def test_a_family_that_cuts_elsewhere_is_left_to_the_library() -> None:
    definition = trained("gpt-4o", 500)
    assert Encoder(definition)._cut is None
    assert Encoder(definition).encode("it's a(b)") == alone(definition, "it's a(b)")


def source(n: int) -> list[str]:
    lines = ["def f(x):\n", "\treturn x + 1  # ü\n", "中文。\n", "\r\n", "'it''s'\n", f"{EOT}\n"]
    pick = random.Random(0)
    return ["".join(pick.choices(lines, k=pick.randrange(30))) for _ in range(n)]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("cores", [1, 64])
def test_a_batch_is_each_text_alone(
    vocab: Vocabulary, monkeypatch: pytest.MonkeyPatch, special: bool, cores: int
) -> None:
    monkeypatch.setattr(module, "_cores", lambda: cores)
    monkeypatch.setattr(module, "_SHARE", 10)
    texts = source(200)
    tok = Tokenizer.from_vocabulary(vocab)
    batch = tok.encode_batch(texts, parse_special=special)
    assert batch == [tok.encode(text, parse_special=special) for text in texts]
    assert all(ids[0] == vocab.bos for ids in batch)
    without = tok.encode_batch(texts, parse_special=special, add_bos=False)
    assert [[vocab.bos, *ids] for ids in without] == batch
    assert tok.encode_batch([]) == []


def test_a_batch_of_another_family() -> None:
    definition = trained("gpt-4o", 500)
    texts = source(50)
    assert Encoder(definition).encode_batch(texts) == [alone(definition, t) for t in texts]


@pytest.mark.parametrize("failing", ["pieces", "library"])
def test_an_error_in_a_batch_is_raised_whichever_side_meets_it(
    vocab: Vocabulary, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    monkeypatch.setattr(module, "_cores", lambda: 64)
    monkeypatch.setattr(module, "_SHARE", 1)
    encoder = Tokenizer.from_vocabulary(vocab)._plain
    library, encode, failed = encoder._library, encoder._encode, threading.Event()

    def fail() -> None:
        failed.set()
        raise Exception("no such merge")

    def by_pieces(text: str) -> list[int]:
        if failing == "pieces":
            fail()
        assert failed.wait(60)
        return encode(text)

    class Library:
        def encode_batch_fast(self, texts: list[str], **how: Any) -> Any:
            if failing == "library":
                fail()
            assert failed.wait(60)
            return library.encode_batch_fast(texts, **how)

    monkeypatch.setattr(encoder, "_encode", by_pieces)
    monkeypatch.setattr(encoder, "_library", Library())
    with pytest.raises(InputError, match="cannot encode with it: no such merge"):
        encoder.encode_batch(["abc"] * 400)


def test_what_is_remembered_is_bounded(
    deepseek_json: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_SEEN", 100)
    ours = Encoder(deepseek_json)
    text = " ".join(f"a{i}" for i in range(5000)) + " " + "b" * 1000
    assert ours.encode(text) == alone(deepseek_json, text)
    assert ours._words is not None
    for seen in (ours._pieces, ours._words):
        assert 0 < len(seen) <= 100
        assert max(map(len, seen)) <= module._MEMORABLE


def test_a_long_text_without_a_cut_ends(
    deepseek_json: dict[str, Any],
) -> None:
    """Where a regex that tries again would never end."""
    for text in ("中a" * 20_000, "é" * 50_000, "(" * 50_000, "a" * 50_000, LETTERS * 2_000):
        assert Encoder(deepseek_json).encode(text) == alone(deepseek_json, text)
