from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsq.errors import InputError, UnsupportedError
from dsq.tokenizer_port.load import load_hf, vocabulary_from_gguf
from dsq.tokenizer_port.vocabulary import TokenType, Vocabulary

from .conftest import BOS, EOS, EOT, LETTERS, TEMPLATE, Maker, added_entry, metadata, n_tokens


def test_deepseek_facts(vocab: Vocabulary, deepseek_json: dict[str, Any]) -> None:
    n = n_tokens(deepseek_json)
    index = vocab.index
    assert vocab.pre == "deepseek-coder"
    assert vocab.bos == index[BOS]
    assert vocab.eos == vocab.eot == index[EOT]
    assert vocab.pad == index[EOS]
    assert vocab.unk is None
    assert vocab.fim_prefix == index["<｜fim▁begin｜>"]
    assert vocab.fim_suffix == index["<｜fim▁hole｜>"]
    assert vocab.fim_middle == index["<｜fim▁end｜>"]
    assert vocab.add_bos
    assert not vocab.add_eos
    assert vocab.chat_template == TEMPLATE
    assert len(vocab.tokens) == n + 10
    assert vocab.tokens[n:] == tuple(f"[PAD{i}]" for i in range(n, n + 10))


def test_types(vocab: Vocabulary, deepseek_json: dict[str, Any]) -> None:
    n = n_tokens(deepseek_json)
    assert vocab.ids_of_type(TokenType.USER_DEFINED) == [vocab.index[c] for c in LETTERS]
    control = {vocab.tokens[i] for i in vocab.ids_of_type(TokenType.CONTROL)}
    assert control == {e["content"] for e in deepseek_json["added_tokens"]} - {*LETTERS}
    assert vocab.ids_of_type(TokenType.UNUSED) == list(range(n, n + 10))
    assert vocab.types[0] == TokenType.NORMAL


def test_merges_as_pairs_and_as_strings(
    vocab: Vocabulary, make_dir: Maker, deepseek_json: dict[str, Any]
) -> None:
    other = copy.deepcopy(deepseek_json)
    pairs = isinstance(other["model"]["merges"][0], list)
    other["model"]["merges"] = [
        " ".join(m) if pairs else m.split(" ") for m in other["model"]["merges"]
    ]
    assert load_hf(make_dir(other), len(vocab.tokens)).merges == vocab.merges
    assert all(merge.count(" ") == 1 for merge in vocab.merges)


def test_ids_from_config_when_tokenizer_config_is_silent(
    make_dir: Maker, deepseek_json: dict[str, Any]
) -> None:
    directory = make_dir(settings={"bos_token": None, "eos_token": None})
    n = n_tokens(deepseek_json)
    vocab = load_hf(
        directory, n, config={"bos_token_id": 5}, generation_config={"eos_token_id": [7, 8]}
    )
    assert (vocab.bos, vocab.eos) == (5, 7)
    (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": EOS}))
    assert load_hf(directory, n, config={"bos_token_id": 5}).eos == vocab.index[EOS]


@pytest.mark.parametrize(
    ("settings", "processor", "expected"),
    [
        ({"add_bos_token": False}, "template", False),
        ({"add_bos_token": None}, "template", True),
        ({"add_bos_token": None}, "bytes", True),  # LlamaTokenizerFast's habit
        ({"add_bos_token": None, "tokenizer_class": "GPT2TokenizerFast"}, "bytes", False),
    ],
)
def test_add_bos(
    make_dir: Maker,
    deepseek_json: dict[str, Any],
    settings: dict[str, Any],
    processor: str,
    expected: bool,
) -> None:
    single = [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    steps = {
        "template": {"type": "TemplateProcessing", "single": single},
        "bytes": {"type": "ByteLevel"},
    }
    tokenizer = {**deepseek_json, "post_processor": steps[processor]}
    directory = make_dir(tokenizer, {k: v for k, v in settings.items() if v is not None} or None)
    if settings["add_bos_token"] is None:
        path = directory / "tokenizer_config.json"
        config = json.loads(path.read_text())
        del config["add_bos_token"]
        path.write_text(json.dumps(config))
    assert load_hf(directory, n_tokens(tokenizer)).add_bos is expected


def test_chat_templates(make_dir: Maker, deepseek_json: dict[str, Any]) -> None:
    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    directory = make_dir(settings={"chat_template": named})
    n = n_tokens(deepseek_json)
    vocab = load_hf(directory, n)
    assert (vocab.chat_template, vocab.chat_templates) == ("A", {"tool_use": "B"})
    (directory / "chat_template.jinja").write_text("C\r\n", newline="")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "rag.jinja").write_text("D")
    vocab = load_hf(directory, n)
    assert (vocab.chat_template, vocab.chat_templates) == ("C\r\n", {"tool_use": "B", "rag": "D"})


def test_added_token_that_is_in_the_base_vocabulary(
    make_dir: Maker, deepseek_json: dict[str, Any]
) -> None:
    """SmolLM2 and Llama 3 list a token twice, with one id."""
    tokenizer = copy.deepcopy(deepseek_json)
    for entry in tokenizer["added_tokens"]:
        tokenizer["model"]["vocab"][entry["content"]] = entry["id"]
    vocab = load_hf(make_dir(tokenizer), n_tokens(tokenizer))
    assert len(vocab.tokens) == n_tokens(tokenizer)
    assert vocab.types[vocab.index[EOT]] == TokenType.CONTROL


def test_token_of_a_fine_tune_in_added_tokens_json_only(
    make_dir: Maker, deepseek_json: dict[str, Any]
) -> None:
    from dsq.tokenizer_port.tokenizer import Tokenizer

    n = n_tokens(deepseek_json)
    directory = make_dir()
    (directory / "added_tokens.json").write_text(json.dumps({"<think>": n + 3}))
    vocab = load_hf(directory, n + 5)
    assert vocab.tokens[n + 3] == "<think>"
    assert vocab.types[n : n + 4] == (5, 5, 5, TokenType.USER_DEFINED)
    # A gap before it: `tokenizers` alone would number it n.
    assert Tokenizer.from_vocabulary(vocab).encode("<think>", add_bos=False) == [n + 3]


def test_special_flag_in_added_tokens_decoder(
    make_dir: Maker, deepseek_json: dict[str, Any]
) -> None:
    n = n_tokens(deepseek_json)
    entry = {"content": "[TOOL]", "special": True}
    vocab = load_hf(make_dir(settings={"added_tokens_decoder": {str(n): entry}}), n + 1)
    assert (vocab.tokens[n], vocab.types[n]) == ("[TOOL]", TokenType.CONTROL)


def broken(change: str, tokenizer: dict[str, Any]) -> dict[str, Any]:
    made = copy.deepcopy(tokenizer)
    last = max(entry["id"] for entry in made["added_tokens"])
    if change == "one id, two tokens":
        made["added_tokens"].append(added_entry(0, "<x>", False))
    elif change == "one token, two ids":
        made["added_tokens"].append(added_entry(last + 1, EOT, False))
    elif change == "a base token again":
        text = next(iter(made["model"]["vocab"]))
        made["added_tokens"].append(added_entry(last + 1, text, False))
    elif change == "bad merge":
        made["model"]["merges"][3] = "a b c"
    elif change == "unigram":
        made["model"]["type"] = "Unigram"
    elif change == "byte fallback":
        made["model"]["byte_fallback"] = True
    elif change == "metaspace":
        made["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁"}
    elif change == "negative id":
        made["model"]["vocab"]["zz"] = -1
    return made


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("one id, two tokens", InputError, "id 0 belongs to .* and to '<x>'"),
        ("one token, two ids", InputError, r"'<\|EOT\|>' has the ids"),
        ("a base token again", InputError, "are both"),
        ("bad merge", InputError, "merge 3 is 'a b c'"),
        ("unigram", UnsupportedError, "'Unigram'; only byte-level BPE"),
        ("byte fallback", UnsupportedError, "SentencePiece-style"),
        ("metaspace", UnsupportedError, "SentencePiece-style"),
        ("negative id", InputError, "has the id -1"),
    ],
)
def test_contradictions_are_refused(
    make_dir: Maker,
    deepseek_json: dict[str, Any],
    change: str,
    error: type[Exception],
    message: str,
) -> None:
    directory = make_dir(broken(change, deepseek_json))
    with pytest.raises(error, match=message) as caught:
        load_hf(directory, 2000)
    assert "\n" not in str(caught.value)
    assert "tokenizer.json" in str(caught.value)


def test_more_tokens_than_rows(make_dir: Maker, deepseek_json: dict[str, Any]) -> None:
    n = n_tokens(deepseek_json)
    load_hf(make_dir(), n)
    with pytest.raises(InputError, match=f"larger than the rows: .* {n - 1}, .* has {n - 1} rows"):
        load_hf(make_dir(), n - 1)


def test_bos_that_is_no_token(make_dir: Maker) -> None:
    with pytest.raises(InputError, match="bos_token is '<s>', which is no token"):
        load_hf(make_dir(settings={"bos_token": "<s>"}), 2000)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found; copy tokenizer"):
        load_hf(tmp_path, 10)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UnsupportedError, match="a SentencePiece tokenizer"):
        load_hf(tmp_path, 10)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(InputError, match="UTF-8"):
        load_hf(tmp_path, 10)
    for text in ("{", "[]", "{}", '{"model": {"vocab": 3}}', "[" * 100_000):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(InputError, match=r"tokenizer\.json"):
            load_hf(tmp_path, 10)


# From a GGUF


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
    entries["tokenizer.huggingface.json"] = vocab.tokenizer_json
    assert vocabulary_from_gguf(entries).pre == "deepseek-coder"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", None, "model: missing"),
        ("model", "llama", "'llama'; only"),
        ("tokens", None, "tokens: missing"),
        ("tokens", [], "a list is needed"),
        ("tokens", ["a", "b", "a"], "tokens 0 and 2 are both 'a'"),
        ("merges", None, "merges: missing"),
        ("token_type", [1, 1], "token_type: has 2 entries"),
        ("bos_token_id", 10**6, "bos_token_id: is 1000000"),
        ("eot_token_id", -1, "eot_token_id: is -1"),
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
