"""Equality with llama.cpp, id for id."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from dsq.tokenizer_port.bytelevel import BYTE_TO_CHAR
from dsq.tokenizer_port.chains import CHAINS, LLAMA_CPP_NAMES, NOT_BYTE_LEVEL
from dsq.tokenizer_port.corpus import corpus
from dsq.tokenizer_port.load import load_hf, vocabulary_from_gguf
from dsq.tokenizer_port.to_hf import tokenizer_json
from dsq.tokenizer_port.tokenizer import Tokenizer
from dsq.tokenizer_port.verify import parity
from dsq.tokenizer_port.vocabulary import Vocabulary

from .conftest import ADDED, LETTERS, Maker, llama_cpp_encoder, metadata, n_tokens, trained

Encoder = Callable[[str], list[int]]

# llama.cpp hides spaces outside ASCII from the regex for CJK, which counts them in (U+0800 to
# U+4E00) and which the model was trained with.
WIDE_SPACE = re.compile("[\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")

_PIECES_OF_TEXT = [
    *(" ", "  ", "\n", "\r\n", "\r", "\t", "\x0b", "\x1c", "\x7f", "\x85", "\xa0", "\u2028"),
    *("\u3000", "\u0308", "e\u0301", "\u200d", "\ufeff", "\ue000", "\U0010ffff", "\u0378"),
    *(" def", " 42", " 42"),
    *"a the S AbC z ß é É İ ĳ ǅ Ж ж Ꭰ ꭰ 中 文字 あ カ ｱ 한국 ㄱ ㄅ ไทย क्षि ᄀ 鷔 𝒳 𠀀 豈".split(),
    *"0 12 123 1234 1234567 ٣ ½ Ⅷ ² 𝟘 's 'RE 'lL ' '' . , !? ( ) | [ ] \\ / _ - + $ ` ~".split(),
    *"= < @ # 。 ， 、 । ۔ ، … — “ « € → © 🙂 👍🏽 <sentinel:7> IMGIMGABCZ".split(),
]


def _random_texts(n: int) -> list[str]:
    rng = random.Random(3)

    def piece() -> str:
        if rng.random() < 0.9:
            return rng.choice(_PIECES_OF_TEXT) * rng.choice((1, 1, 1, 1, 2, 5))
        while True:  # assigned when this Python was made: the engines' tables agree on it
            char = chr(rng.choice((rng.randrange(1, 0x3400), rng.randrange(0xF900, 0x20000))))
            if unicodedata.category(char) != "Cn" and char != "ſ":
                return char

    return ["".join(piece() for _ in range(rng.randint(1, 12))) for _ in range(n)]


TEXTS = [
    'def add(a: int, b: int) -> int:\n    """Sum."""\n    return a + b  # ok\n',
    "const f = async (x) => { await x?.y ?? `t${1 + 2}`; };\r\nexport default f;\r\n",
    "I've, you're, we'll; I'VE, WE'LL. Größe Straße naïve Łódź; cafe\u0301 u\u0308ber",
    "你好，世界！\u3000这是 日本語のテキスト 안녕하세요 Привет नमस्ते दुनिया สวัสดี",
    "0 12 123 1234567890 3.14159 v1.2.3-rc4 ٣٤٥ ½²Ⅷ  1,000,000",
    "   leading\n\n\n \t trailing   ",
    *_random_texts(200),
]


@pytest.fixture(scope="module")
def borderless() -> Vocabulary:
    """Its merges go across every border, so that each cut of a pre-tokenizer shows."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=4000,
        initial_alphabet=list(BYTE_TO_CHAR.values()),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = tuple(sorted(model["vocab"], key=model["vocab"].__getitem__))
    return Vocabulary(
        *("gpt2", "default", tokens, (1,) * len(tokens)),
        tuple(" ".join(merge) for merge in model["merges"]),
        *(None,) * 8,
        add_bos=False,
        add_eos=False,
        add_space_prefix=None,
    )


# In the two, what the model was trained with goes before llama.cpp's rule.
@pytest.mark.parametrize(
    "name", sorted(LLAMA_CPP_NAMES - NOT_BYTE_LEVEL - {"deepseek-coder", "deepseek-llm"})
)
def test_every_name(name: str, borderless: Vocabulary, tmp_path: Path) -> None:
    vocab = dataclasses.replace(borderless, pre=name)
    assert parity(vocab, llama_cpp_encoder(vocab, tmp_path / "v.gguf"), TEXTS) == []


def test_where_deepseek_coder_differs(borderless: Vocabulary, tmp_path: Path) -> None:
    vocab = dataclasses.replace(borderless, pre="deepseek-coder")
    found = parity(vocab, llama_cpp_encoder(vocab, tmp_path / "v.gguf"), TEXTS)
    assert found != []
    assert all(WIDE_SPACE.search(mismatch.text) for mismatch in found)


@pytest.mark.parametrize("name", CHAINS)
def test_every_published_chain(name: str, make_dir: Maker, tmp_path: Path) -> None:
    tokenizer = trained(name, 500)
    silent = {"bos_token": None, "eos_token": None, "pad_token": None, "add_bos_token": False}
    loaded = load_hf(make_dir(tokenizer, silent), n_tokens(tokenizer))
    assert loaded.pre == name
    # Rebuilt from what a GGUF holds, without the tokenizer.json.
    vocab = vocabulary_from_gguf(metadata(loaded))
    published = Tokenizer(vocab, tokenizer_json(vocab, published=True))
    assert parity(loaded, partial(published.encode, add_bos=False), TEXTS) == []
    texts = [text for text in TEXTS if not WIDE_SPACE.search(text)]
    assert parity(vocab, llama_cpp_encoder(vocab, tmp_path / "v.gguf"), texts) == []


@pytest.fixture(scope="module")
def deepseek(
    tmp_path_factory: pytest.TempPathFactory, deepseek_json: dict[str, Any]
) -> tuple[Vocabulary, dict[bool, Encoder]]:
    directory = tmp_path_factory.mktemp("deepseek")
    (directory / "tokenizer.json").write_text(json.dumps(deepseek_json))
    vocab = load_hf(directory, n_tokens(deepseek_json) + 3)
    return vocab, {
        special: llama_cpp_encoder(vocab, directory / "v.gguf", special=special)
        for special in (True, False)
    }


@pytest.mark.parametrize("parse_special", [True, False])
def test_deepseek(deepseek: tuple[Vocabulary, dict[bool, Encoder]], parse_special: bool) -> None:
    vocab, encoders = deepseek
    texts = [text for text in corpus(vocab) if not WIDE_SPACE.search(text)]
    assert parity(vocab, encoders[parse_special], texts, parse_special=parse_special) == []


_PIECES = st.sampled_from(
    [*ADDED, " ", "  ", "\n", "\r\n", "\t", "1", "23", "a", "def ", "=", "+", "(", "_", "é", "中"]
)
_TEXT = st.lists(
    st.one_of(_PIECES, st.text(st.characters(exclude_categories=["Cs"]), max_size=6)), max_size=12
).map("".join)


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(text=_TEXT, parse_special=st.booleans())
def test_deepseek_on_any_text(
    deepseek: tuple[Vocabulary, dict[bool, Encoder]], text: str, parse_special: bool
) -> None:
    if "\0" in text:  # ends the text for llama-cpp-python
        return
    vocab, encoders = deepseek
    assert parity(vocab, encoders[parse_special], [text], parse_special=parse_special) == []


def test_parity_tells_what_differs(deepseek: tuple[Vocabulary, dict[bool, Encoder]]) -> None:
    vocab, _ = deepseek
    ours = Tokenizer.from_vocabulary(vocab)

    def wrong(text: str) -> list[int]:
        ids = ours.encode(text, add_bos=False, parse_special=True)
        return ids[:-1] if text == LETTERS else ids

    (mismatch,) = parity(vocab, wrong)
    assert mismatch.text == LETTERS
    assert mismatch.first == len(LETTERS) - 1
    assert mismatch.ours[:-1] == mismatch.theirs
    assert f"from token {mismatch.first} on" in str(mismatch)
