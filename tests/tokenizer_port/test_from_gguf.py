"""A vocabulary from a GGUF's metadata."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsq.errors import InputError, UnsupportedError
from dsq.tokenizer_port.from_gguf import vocabulary_from_gguf
from dsq.tokenizer_port.tokenizer import Tokenizer
from dsq.tokenizer_port.verify import parity
from dsq.tokenizer_port.vocabulary import TokenType, Vocabulary

from .conftest import BOS, EOS, llama_cpp_encoder, metadata


def test_gguf_round_trip(vocab: Vocabulary) -> None:
    again = vocabulary_from_gguf(metadata(vocab))
    assert {**again.__dict__, "tokenizer_json": None, "index": None} == {
        **vocab.__dict__,
        "tokenizer_json": None,
        "index": None,
    }


def test_gguf_arrays_of_numpy(vocab: Vocabulary) -> None:
    entries = metadata(vocab)
    entries["tokenizer.ggml.token_type"] = np.array(vocab.types, dtype=np.int32)
    entries["tokenizer.ggml.bos_token_id"] = np.uint32(vocab.bos or 0)
    again = vocabulary_from_gguf(entries)
    assert again.types == vocab.types
    assert type(again.types[0]) is int
    assert type(again.bos) is int


def test_gguf_types_of_old_converters_are_mended(vocab: Vocabulary) -> None:
    entries = metadata(vocab)
    user = int(TokenType.USER_DEFINED)
    special = (BOS, EOS)
    entries["tokenizer.ggml.token_type"] = [
        user
        if kind == TokenType.UNUSED or (kind == TokenType.CONTROL and text not in special)
        else kind
        for text, kind in zip(vocab.tokens, vocab.types, strict=True)
    ]
    assert vocabulary_from_gguf(entries).types == vocab.types


def test_gguf_without_pre_says_what_to_do(vocab: Vocabulary) -> None:
    entries = metadata(vocab)
    del entries["tokenizer.ggml.pre"]
    with pytest.raises(InputError, match=r"before April 2024.*--pre deepseek-coder"):
        vocabulary_from_gguf(entries)
    assert vocabulary_from_gguf(entries, pre="deepseek-coder").pre == "deepseek-coder"
    # of an unknown family, neither this nor `dsq doctor` knows the name
    tokens = ["<letter>" if token == "û" else token for token in vocab.tokens]
    with pytest.raises(InputError, match=r"--pre NAME, .* dsq doctor FILE --fix OUT --pre NAME$"):
        vocabulary_from_gguf({**entries, "tokenizer.ggml.tokens": tokens})
    entries["tokenizer.huggingface.json"] = vocab.tokenizer_json
    assert vocabulary_from_gguf(entries).pre == "deepseek-coder"


@pytest.mark.parametrize("pre", [None, "", "default"])
def test_gguf_without_pre_runs_by_llama_cpps_rule(
    vocab: Vocabulary, pre: str | None, tmp_path: Path
) -> None:
    entries = {**metadata(vocab), "tokenizer.ggml.pre": pre}
    with pytest.raises(InputError, match="dsq doctor FILE --fix OUT"):
        vocabulary_from_gguf(entries)
    foreign = vocabulary_from_gguf(entries, allow_default=True)
    assert foreign.pre == "default"
    encode = llama_cpp_encoder(foreign, tmp_path / "v.gguf")
    assert parity(foreign, encode) == []
    assert parity(vocab, encode) != []  # not the tokens that the model was trained on
    entries["tokenizer.huggingface.json"] = vocab.tokenizer_json
    assert vocabulary_from_gguf(entries, allow_default=True).pre == "deepseek-coder"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", None, "model: missing"),
        ("model", "llama", "'llama'; only"),
        ("tokens", None, "tokens: missing"),
        ("tokens", [], "tokens: has no entries"),
        ("merges", [], "merges: has no entries"),
        ("merges", ["☃ a"], "merges: merge 0 is '☃ a', but '☃' is no token"),
        ("merges", ["~ ~"], "merges: merge 0 is '~ ~', but '~~' is no token"),
        ("merges", ["ab"], "merges: merge 0 is 'ab', not two tokens with one space"),
        ("merges", ["a b c"], "merge 0 is 'a b c', not two tokens with one space"),
        ("merges", [" a"], "merge 0 is ' a', not two tokens with one space"),
        ("tokens", ["a", "b", "a"], "tokens 0 and 2 are both 'a'"),
        ("merges", None, "merges: missing"),
        ("token_type", [1, 1], "token_type: has 2 entries"),
        ("bos_token_id", 10**6, "bos_token_id: is 1000000"),
        ("eot_token_id", -1, "eot_token_id: is -1"),
        ("model", 7, "model is 7; a string is needed"),
        ("model", np.zeros(3), "model is array"),
        ("pre", 7, "pre is 7; a string is needed"),
        ("tokens", [1, 2], "tokens: entry 0 is 1, a string is needed"),
        ("tokens", "abc", "tokens: is 'abc', a list is needed"),
        ("merges", ["a b", None], "merges: entry 1 is None, a string is needed"),
        ("token_type", ["x"], "token_type: entry 0 is 'x', a whole number"),
        ("token_type", np.array([1.5]), "token_type: entry 0 is 1.5, a whole number"),
        ("bos_token_id", "1", "bos_token_id: is '1', a whole number"),
        ("bos_token_id", [1], r"bos_token_id: is \[1\], a whole number"),
        ("bos_token_id", True, "bos_token_id: is True, a whole number"),
        ("bos_token_id", np.arange(3), "bos_token_id: is array"),
        ("add_bos_token", 1, "add_bos_token is 1; true or false is needed"),
        ("add_eos_token", "no", "add_eos_token is 'no'; true or false is needed"),
        ("add_space_prefix", [], r"add_space_prefix is \[\]; true or false is needed"),
    ],
)
def test_gguf_errors(vocab: Vocabulary, key: str, value: Any, message: str) -> None:
    entries = metadata(vocab)
    entries[f"tokenizer.ggml.{key}"] = value
    if value is None:
        del entries[f"tokenizer.ggml.{key}"]
    with pytest.raises(InputError, match=message):
        vocabulary_from_gguf(entries)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("chat_template", 5, "chat_template is 5; a string"),
        ("chat_template.rag", ["x"], r"chat_template.rag is \['x'\]; a string"),
        ("huggingface.json", {}, r"huggingface.json is \{\}; a string"),
    ],
)
def test_gguf_texts_of_another_type(vocab: Vocabulary, key: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        vocabulary_from_gguf({**metadata(vocab), f"tokenizer.{key}": value})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds a JSON list; expected an object"),
        ("{}", "model is missing; an object is needed"),
        ('{"model": 7}', "model is 7; an object is needed"),
        ('{"model": {"vocab": []}}', r"model.vocab is \[\]; an object is needed"),
        ('{"model": {"vocab": {"a": "b"}}}', "token 'a' has the id 'b', no row number"),
        ('{"model": {"vocab": {"a": 0}}, "model": 1}', "the key 'model' is given twice"),
        ('{"model": {"vocab": {"a": 0}}, "normalizer": 5}', "normalizer is 5; an object"),
    ],
)
@pytest.mark.parametrize("pre", ["named", "to be found"])
def test_gguf_with_a_bad_tokenizer_json(
    vocab: Vocabulary, text: str, message: str, pre: str
) -> None:
    entries = {**metadata(vocab), "tokenizer.huggingface.json": text}
    if pre == "to be found":
        del entries["tokenizer.ggml.pre"]
    with pytest.raises(InputError, match=f"tokenizer.huggingface.json: {message}") as caught:
        Tokenizer.from_vocabulary(vocabulary_from_gguf(entries))
    assert not isinstance(caught.value, UnsupportedError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"types": (1,)}, "tokens but 1 token types"),
        ({"eos": 10**6}, "eos is token 1000000, but ids go from 0"),
        ({"fim_middle": -1}, "fim_middle is token -1"),
        ({"bos": None}, "add_bos is true, but there is no BOS"),
    ],
)
def test_a_vocabulary_that_contradicts_itself(
    vocab: Vocabulary, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(vocab, **changes)


def test_markers_of_a_file_without_types_stay_out_of_reach(vocab: Vocabulary) -> None:
    entries = metadata(vocab)
    del entries["tokenizer.ggml.token_type"]
    again = vocabulary_from_gguf(entries)
    assert again.types[vocab.index[BOS]] == TokenType.CONTROL
    assert again.types[vocab.index["a"]] == TokenType.NORMAL


def test_the_end_of_a_turn_is_found_by_its_text(vocab: Vocabulary) -> None:
    entries = metadata(vocab)
    del entries["tokenizer.ggml.eot_token_id"]
    assert vocabulary_from_gguf(entries).eot == vocab.eot is not None
