from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from dsq.errors import InputError
from dsq.tokenizer_port.corpus import corpus
from dsq.tokenizer_port.load import load_hf, vocabulary_from_gguf
from dsq.tokenizer_port.to_hf import hf_files, tokenizer_json
from dsq.tokenizer_port.tokenizer import Tokenizer
from dsq.tokenizer_port.vocabulary import TokenType, Vocabulary

from .conftest import BOS, EOS, EOT, TEMPLATE, added_entry, metadata


def library(definition: dict[str, Any]) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(definition))


def test_the_models_own_file_is_kept(vocab: Vocabulary, deepseek_json: dict[str, Any]) -> None:
    assert tokenizer_json(vocab) == deepseek_json


def test_rebuilt_from_a_gguf(vocab: Vocabulary, deepseek_json: dict[str, Any]) -> None:
    rebuilt = library(tokenizer_json(vocabulary_from_gguf(metadata(vocab))))
    own = library(deepseek_json)
    for text in corpus(vocab):
        assert rebuilt.encode(text).ids == own.encode(text).ids


def test_the_published_spelling(vocab: Vocabulary, deepseek_json: dict[str, Any]) -> None:
    """What DeepSeek's file says of each added token; all of it is in tests/…/test_peers.py."""
    rebuilt = tokenizer_json(vocabulary_from_gguf(metadata(vocab)), published=True)
    assert rebuilt["added_tokens"] == deepseek_json["added_tokens"]
    assert rebuilt["model"]["vocab"] == deepseek_json["model"]["vocab"]
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        assert rebuilt[part] == deepseek_json[part]


def test_ids_are_kept_across_a_gap(vocab: Vocabulary) -> None:
    """`tokenizers` would number an added token on from the vocabulary, whatever its id."""
    first = vocab.types.index(TokenType.UNUSED)
    tokens, types = list(vocab.tokens), list(vocab.types)
    tokens[first + 3], types[first + 3] = "<think>", TokenType.USER_DEFINED
    entries = metadata(dataclasses.replace(vocab, tokens=tuple(tokens), types=tuple(types)))
    rebuilt = library(tokenizer_json(vocabulary_from_gguf(entries), published=True))
    assert rebuilt.encode(f"<think>{EOT}").ids == [first + 3, vocab.index[EOT]]


def test_a_normalizer_is_published_but_not_llama_cpps(vocab: Vocabulary) -> None:
    foreign = vocabulary_from_gguf({**metadata(vocab), "tokenizer.ggml.pre": "qwen2"})
    assert tokenizer_json(foreign)["normalizer"] is None
    assert hf_files(foreign, 16)["tokenizer.json"]["normalizer"] == {"type": "NFC"}


def _swap_merges(own: dict[str, Any]) -> None:
    merges = own["model"]["merges"]
    merges[4], merges[5] = merges[5], merges[4]


def _change(own: dict[str, Any], text: str, row: int | None) -> None:
    """Give the added token another id, or none."""
    entry = next(entry for entry in own["added_tokens"] if entry["content"] == text)
    if row is None:
        own["added_tokens"].remove(entry)
    else:
        entry["id"] = row


DISAGREEMENTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another merge": (_swap_merges, "merge 4 is"),
    "a merge less": (lambda own: own["model"]["merges"].pop(), "merges, tokenizer.ggml.merges"),
    "no merges": (lambda own: own["model"].pop("merges"), "has 0 merges"),
    "another id": (lambda own: _change(own, EOT, 5), "has the id 5, but in tokenizer.ggml.tokens"),
    "a token less": (lambda own: _change(own, EOT, None), r"lacks token \d+, '<\|EOT\|>' in"),
    "a base token added": (
        lambda own: own["added_tokens"].append(added_entry(0, "!", False)),
        "token 0, '!', is an added token, but",
    ),
}


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_a_tokenizer_json_that_contradicts_the_arrays(
    vocab: Vocabulary, deepseek_json: dict[str, Any], name: str
) -> None:
    change, message = DISAGREEMENTS[name]
    own = copy.deepcopy(deepseek_json)
    change(own)
    with pytest.raises(InputError, match=message) as caught:
        tokenizer_json(dataclasses.replace(vocab, tokenizer_json=json.dumps(own)))
    assert "tokenizer.huggingface.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("way", ["own", "rebuilt"])
def test_files_for_a_directory(vocab: Vocabulary, tmp_path: Path, way: str) -> None:
    source = vocab if way == "own" else vocabulary_from_gguf(metadata(vocab))
    files = hf_files(source, 16384)
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    config = files["tokenizer_config.json"]
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == (BOS, EOT, EOS)
    assert config["model_max_length"] == 16384
    assert config["add_bos_token"] is True
    assert config["chat_template"] == TEMPLATE
    # What reads tokenizer.json gets BOS once, and the model's ids.
    tok = Tokenizer.from_vocabulary(vocab)
    written = library(files["tokenizer.json"])
    for text in ("", "def f():\n\treturn 'ü'", f"{EOT} x"):
        assert written.encode(text).ids == tok.encode(text, parse_special=True)
    # And the directory reads back as the vocabulary it came from.
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    again = load_hf(tmp_path, len(vocab.tokens))
    assert dataclasses.replace(again, tokenizer_json=None) == dataclasses.replace(
        vocab, tokenizer_json=None
    )


def test_bos_is_not_added_twice(vocab: Vocabulary) -> None:
    once = hf_files(vocab, 16)["tokenizer.json"]
    twice = hf_files(dataclasses.replace(vocab, tokenizer_json=json.dumps(once)), 16)
    assert twice["tokenizer.json"] == once
    without = hf_files(dataclasses.replace(vocab, add_bos=False), 16)["tokenizer.json"]
    assert vocab.bos not in library(without).encode("x").ids


def test_named_templates(vocab: Vocabulary) -> None:
    named = dataclasses.replace(vocab, chat_templates={"tool_use": "B"})
    assert hf_files(named, 16)["tokenizer_config.json"]["chat_template"] == [
        {"name": "default", "template": TEMPLATE},
        {"name": "tool_use", "template": "B"},
    ]


@pytest.mark.torch
@pytest.mark.parametrize("way", ["own", "rebuilt"])
def test_transformers_reads_the_same_ids(vocab: Vocabulary, tmp_path: Path, way: str) -> None:
    from transformers import AutoTokenizer

    source = vocab if way == "own" else vocabulary_from_gguf(metadata(vocab))
    for name, content in hf_files(source, 4096).items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    tok = Tokenizer.from_vocabulary(vocab)
    for text in corpus(vocab):
        if text.startswith(BOS):
            continue  # transformers puts another BOS before it
        assert theirs(text)["input_ids"] == tok.encode(text, parse_special=True)
    messages = [{"role": "user", "content": "Hi  ü"}, {"role": "assistant", "content": " x "}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == tok.chat(messages)
    assert theirs.model_max_length == 4096
