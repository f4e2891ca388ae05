from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from dsq.tokenizer_port.corpus import corpus
from dsq.tokenizer_port.load import load_hf, vocabulary_from_gguf
from dsq.tokenizer_port.to_hf import hf_files, tokenizer_json
from dsq.tokenizer_port.tokenizer import Tokenizer
from dsq.tokenizer_port.vocabulary import Vocabulary

from .conftest import BOS, EOS, EOT, TEMPLATE, metadata


def library(definition: dict[str, Any]) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(definition))


def test_the_models_own_file_is_kept(vocab: Vocabulary, deepseek_json: dict[str, Any]) -> None:
    assert tokenizer_json(vocab) == deepseek_json


def test_rebuilt_from_a_gguf(vocab: Vocabulary, deepseek_json: dict[str, Any]) -> None:
    rebuilt = library(tokenizer_json(vocabulary_from_gguf(metadata(vocab))))
    own = library(deepseek_json)
    for text in corpus(vocab):
        assert rebuilt.encode(text).ids == own.encode(text).ids


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
