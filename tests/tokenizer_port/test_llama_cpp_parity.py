"""Equality with llama.cpp, id for id."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsq.tokenizer_port.load import load_hf, vocabulary_from_gguf
from dsq.tokenizer_port.pretokenize import ALIASES, CHAINS
from dsq.tokenizer_port.tokenizer import Tokenizer
from dsq.tokenizer_port.verify import parity
from dsq.tokenizer_port.vocabulary import Vocabulary

from .conftest import ADDED, LETTERS, Maker, llama_cpp_encoder, metadata, n_tokens, trained

Encoder = Callable[[str], list[int]]

# llama.cpp does not normalize: the one decomposed text of the corpus is expected to differ.
WITH_NFC = sorted(name for name, chain in CHAINS.items() if chain.normalizers)


@pytest.mark.parametrize("name", [*CHAINS, "starcoder", "refact", "glm4", "smaug-bpe"])
def test_every_chain(name: str, make_dir: Maker, tmp_path: Path) -> None:
    tokenizer = trained(name, 500)
    silent = {"bos_token": None, "eos_token": None, "pad_token": None, "add_bos_token": False}
    loaded = load_hf(make_dir(tokenizer, silent), n_tokens(tokenizer))
    assert loaded.pre == ALIASES.get(name, name)
    # Rebuilt from what a GGUF holds, without the tokenizer.json; under the name asked for.
    vocab = vocabulary_from_gguf({**metadata(loaded), "tokenizer.ggml.pre": name})
    encode = llama_cpp_encoder(vocab, tmp_path / "v.gguf")
    differing = [m.text for m in parity(vocab, encode)]
    expected = ["cafe\u0301 u\u0308ber n\u0303"] if loaded.pre in WITH_NFC else []
    assert differing == expected
    assert parity(loaded, Tokenizer.from_vocabulary(vocab).encode) == []


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
    assert parity(vocab, encoders[parse_special], parse_special=parse_special) == []


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
