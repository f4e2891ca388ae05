"""Shrinking a mismatch, naming what is to blame, and what docs/tokenizer.md says of llama.cpp."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from dsq.convert.gguf.reader import read_gguf
from dsq.runtime.llama_vocab import llama_vocab
from dsq.tokenizer_port.load import vocabulary_from_gguf
from dsq.tokenizer_port.shrink import PLAIN, blame, code_point, shrink
from dsq.tokenizer_port.to_hf import tokenizer_json
from dsq.tokenizer_port.tokenizer import Tokenizer
from tests.models import ROOT

PROFILE = settings(max_examples=200, deadline=None, database=None)
Encode = Callable[[str], list[int]]


def holds(needle: str, text: str) -> bool:
    """Whether the characters of `needle` occur in `text`, in this order."""
    rest = iter(text)
    return all(char in rest for char in needle)


@PROFILE
@given(needle=st.text(min_size=1, max_size=5), data=st.data())
def test_nothing_but_the_needle_is_left(needle: str, data: st.DataObject) -> None:
    text = "".join(data.draw(st.text(max_size=30)) + char for char in needle)
    text += data.draw(st.text(max_size=30))
    assert shrink(text, lambda t: holds(needle, t)) == needle


@PROFILE
@given(text=st.text("ab \n1.üß中", max_size=25), salt=st.integers(0, 1000))
def test_nothing_can_be_taken_from_it(text: str, salt: int) -> None:
    """Of a fault without any order to it, too."""

    def fails(t: str) -> bool:
        return t == text or (t != "" and zlib.crc32(f"{salt}{t}".encode()) % 3 == 0)

    found = shrink(text, fails)
    assert fails(found)
    assert len(found) <= len(text)
    for i, char in enumerate(found):
        assert not fails(found[:i] + found[i + 1 :])
        simpler = PLAIN[: PLAIN.index(char)] if char in PLAIN else PLAIN
        assert not any(fails(found[:i] + plain + found[i + 1 :]) for plain in simpler)


def test_characters_that_do_not_matter_become_plain() -> None:
    # Three characters of any kind, the second one a thin space.
    assert shrink("中\u2009文字", lambda t: "\u2009" in t[1:-1]) == "a\u2009a"


def test_a_spent_budget_leaves_a_text_that_fails() -> None:
    tried = 0

    def fails(text: str) -> bool:
        nonlocal tried
        tried += len(text)
        return text.count("x") >= 2

    text = "x" + "-" * 10_000 + "x"
    found = shrink(text, fails, budget=60_000)
    assert found.count("x") == 2
    assert tried <= 60_000
    assert shrink(text, fails) == "xx"


@pytest.mark.parametrize(
    ("smallest", "blamed"),
    [
        ("\u2009s", ["U+2009 THIN SPACE (Zs)"]),
        ("a\x00\x85", ["U+0000 <control> (Cc)", "U+0085 <control> (Cc)"]),
        ("\u2008다", ["U+2008 PUNCTUATION SPACE (Zs)"]),
        ("aü", ["U+00FC LATIN SMALL LETTER U WITH DIAERESIS (Ll)"]),
        ("11", ["U+0031 DIGIT ONE (Nd)"]),
        ("\ue000", ["U+E000 <private use> (Co)"]),
    ],
)
def test_blame(smallest: str, blamed: list[str]) -> None:
    assert list(map(str, blame(smallest))) == blamed


def test_a_code_point_without_a_name() -> None:
    point = code_point("\U000effff")
    assert str(point).startswith("U+EFFFF <not in Unicode 1")
    assert point.to_json()["category"] == "Cn"


# DeepSeek Coder's own vocabulary, against what the documentation says of it.


@pytest.fixture(scope="module")
def deepseek(llama_cpp_source) -> Iterator[tuple[Encode, Encode, Encode]]:
    """The tokenizers library on the published tokenizer.json, dsq, llama.cpp."""
    path = llama_cpp_source / "models" / "ggml-vocab-deepseek-coder.gguf"
    vocab = vocabulary_from_gguf(read_gguf(path).metadata)
    library = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(vocab, published=True)))
    own = Tokenizer.from_vocabulary(vocab)
    with llama_vocab(vocab) as theirs:
        yield (
            lambda text: library.encode(text, add_special_tokens=False).ids,
            lambda text: own.encode(text, add_bos=False, parse_special=True),
            theirs.encode,
        )


@pytest.fixture(scope="module")
def documented() -> dict[str, list[str]]:
    """The characters in the table of classes, by class."""
    text = (ROOT / "docs" / "tokenizer.md").read_text(encoding="utf-8")
    found = {}
    for name in ("L", "P"):
        (row,) = re.findall(rf"^\| `\\p{{{name}}}` \| (.*) \|$", text, re.MULTILINE)
        found[name] = [
            chr(code)
            for part in row.split(", ")
            for first, last in [(part.split("–") * 2)[:2]]
            for code in range(int(first, 16), int(last, 16) + 1)
        ]
    return found


def differing(engines: tuple[Encode, Encode, Encode], texts: list[str]) -> list[str]:
    """Of texts without line ends, those that llama.cpp encodes otherwise than HF and dsq."""
    hf, own, theirs = engines
    together = "\n".join(texts)  # a line end is cut off first, whatever is beside it
    assert own(together) == hf(together)
    lines = [_lines(encode(together), hf("\n")[0]) for encode in (hf, theirs)]
    return [text for text, a, b in zip(texts, *lines, strict=True) if a != b]


def _lines(ids: list[int], end: int) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for i in ids:
        if i == end:
            found.append([])
        else:
            found[-1].append(i)
    return found


def test_the_thin_space(deepseek) -> None:
    hf, own, theirs = deepseek
    assert hf("5\u2009s") == own("5\u2009s") == [20, 350, 218, 82]
    assert theirs("5\u2009s") == [20, 350, 6950]
    white = "\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029"
    white += "\u202f\u205f\u3000"
    beside = [*map(chr, range(0x20, 0x180)), *"→♪中あ한🙂\u3000\u2028"]
    texts = [f"{a}{space}{b}" for space in white for a in ("", " ", "=", "a") for b in beside]
    assert differing(deepseek, texts) == ["\u2009s", " \u2009s", "=\u2009s", "a\u2009s"]


def test_letters_of_unicode_16(deepseek, documented) -> None:
    letters, marks = documented["L"], documented["P"]
    assert (len(letters), len(marks)) == (4302, 13)
    both = letters + marks
    for before in ("  ", "\t\t", "x = ", "\u00a0\u00a0", " < ", " \u0085"):
        assert differing(deepseek, [before + char for char in both]) == [before + c for c in both]
    for around in ("{}", " {}", "a{}b", "({})", "1{}1", "中{}"):
        assert differing(deepseek, [around.format(char) for char in both]) == []
    after = differing(deepseek, [f"{char}s" for char in both])
    assert len(after) == 67
    assert after == [f"{c}s" for c in letters if c.encode()[-1] == 0x89 and c > "\u4e00"]


def test_no_others(deepseek, documented) -> None:
    """Every 97th code point, and the neighbours of the documented ones."""
    known = {*documented["L"], *documented["P"]}
    near = {chr(ord(char) + step) for char in known for step in (-1, 1)}
    chars = [chr(code) for code in range(0, 0x110000, 97) if not 0xD800 <= code < 0xE000]
    chars = [char for char in (*chars, *near) if char not in known and char not in "\r\n"]
    for around in ("  {}", " = {}", "{}s", "a{}b", "{}{}"):
        texts = [around.format(char, char) for char in chars]
        assert differing(deepseek, texts) in ([], ["\u2009s"])


def test_the_letters_that_hugging_face_loses(deepseek, llama_cpp_source) -> None:
    path = llama_cpp_source / "models" / "ggml-vocab-deepseek-coder.gguf"
    vocab = vocabulary_from_gguf(read_gguf(path).metadata)
    library = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(vocab, published=True)))
    own = Tokenizer.from_vocabulary(vocab)
    ids = own.encode("Führer", add_bos=False)
    assert (library.decode(ids), own.decode(ids)) == ("F\ufffdhrer", "Führer")
    for row in range(32000, 32013):
        assert library.decode([row]) == "\ufffd"
        assert own.decode([row]) == vocab.tokens[row]
        never = ord(vocab.tokens[row])
        assert never in (0xC0, 0xC1) or 0xF5 <= never <= 0xFF  # the bytes that UTF-8 has not
