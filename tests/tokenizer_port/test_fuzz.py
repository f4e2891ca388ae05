"""Whatever stands in a model's files, nothing but dsq's own errors comes out."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsq.errors import DsqError
from dsq.tokenizer_port.load import load_hf, vocabulary_from_gguf
from dsq.tokenizer_port.to_hf import hf_files
from dsq.tokenizer_port.tokenizer import Tokenizer
from dsq.tokenizer_port.vocabulary import Vocabulary

from .conftest import BOS, EOS, EOT, metadata, n_tokens

PROFILE = settings(
    max_examples=150,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

WORDS = st.sampled_from(
    (
        *("", "type", "BPE", "Sequence", "ByteLevel", "Split", "TemplateProcessing", "single"),
        *("processors", "normalizers", "pretokenizers", "SpecialToken", "content", "special"),
        *("id", "name", "template", "default", "model", "vocab", "merges", "\ud800", "²", "7"),
        *(BOS, EOS, EOT, "Ġ", "Ġ t"),
    )
)
SCALARS = (
    st.none() | st.booleans() | st.integers(-2, 2**64) | st.floats() | WORDS | st.text(max_size=5)
)
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
NUMPY_VALUES = st.lists(st.integers(-3, 9), max_size=40).map(np.array) | st.integers(0, 9).map(
    np.uint32
)

Place = tuple[Any, ...]


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Where a value can be replaced: everywhere, but of a long list only at its ends."""
    yield place
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    for key in [*keys[:8], *keys[8:][-2:]]:
        yield from places(value[key], (*place, key))


def replaced(value: Any, place: Place, new: Any) -> Any:
    if not place:
        return new
    changed = copy.copy(value)
    changed[place[0]] = replaced(value[place[0]], place[1:], new)
    return changed


def changed_at_random(data: st.DataObject, value: Any) -> Any:
    """One or two values replaced by arbitrary ones."""
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(list(places(value))))
        value = replaced(value, place, data.draw(JSON_VALUES))
    return value


def use(vocab: Vocabulary) -> None:
    """What is read without complaint can be used, or the use is refused in one line."""
    tokenizer = Tokenizer.from_vocabulary(vocab)
    text = f"def f():\n\treturn 'ü' {EOT}"
    for special in (False, True):
        ids = tokenizer.encode(text, parse_special=special)
        assert tokenizer.encode_batch([text], parse_special=special) == [ids]
        tokenizer.decode(ids)
    tokenizer.fim("a", "b")
    tokenizer.chat([{"role": "user", "content": "Hi"}])
    hf_files(vocab, 4096)


@contextlib.contextmanager
def only_our_errors() -> Iterator[None]:
    message = ""
    try:
        yield
    except DsqError as error:
        message = str(error)
    assert "\n" not in message
    message.encode()  # can be printed


@pytest.fixture
def files(deepseek_json: dict[str, Any]) -> dict[str, Any]:
    """A model directory's small files, with all that dsq reads in them."""
    n = n_tokens(deepseek_json)
    row = next(e["id"] for e in deepseek_json["added_tokens"] if e["content"] == BOS)
    bos = {"SpecialToken": {"id": BOS, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [row], "tokens": [BOS]}},
    }
    steps = [deepseek_json["post_processor"], template]
    return {
        "tokenizer.json": {
            **deepseek_json,
            "normalizer": {"type": "Sequence", "normalizers": []},
            "post_processor": {"type": "Sequence", "processors": steps},
        },
        "tokenizer_config.json": {
            "bos_token": {"__type": "AddedToken", "content": BOS},
            "pad_token": EOS,
            "added_tokens_decoder": {str(n): {"content": "[TOOL]", "special": True}},
            "chat_template": [{"name": "default", "template": "{{ messages[0]['content'] }}"}],
            "tokenizer_class": "LlamaTokenizerFast",
        },
        "special_tokens_map.json": {"eos_token": EOT},
        "added_tokens.json": {"<think>": n + 1},
    }


def test_the_files_are_good_before_they_are_changed(tmp_path: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    vocab = load_hf(tmp_path, n_tokens(files["tokenizer.json"]) + 3)
    use(vocab)
    use(vocabulary_from_gguf(gguf_entries(vocab)))


@PROFILE
@given(data=st.data())
def test_any_value_in_a_directory(tmp_path: Path, files: dict[str, Any], data: Any) -> None:
    name = data.draw(st.sampled_from(list(files)))
    changed = {**files, name: changed_at_random(data, files[name])}
    for file, content in changed.items():
        (tmp_path / file).write_text(json.dumps(content))
    with only_our_errors():
        use(load_hf(tmp_path, n_tokens(files["tokenizer.json"]) + 3))


def gguf_entries(vocab: Vocabulary) -> dict[str, Any]:
    return {
        **metadata(vocab),
        "tokenizer.ggml.fim_pre_token_id": vocab.fim_prefix,
        "tokenizer.ggml.fim_suf_token_id": vocab.fim_suffix,
        "tokenizer.ggml.fim_mid_token_id": vocab.fim_middle,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template.tool_use": "B",
        "tokenizer.huggingface.json": vocab.tokenizer_json,
    }


@PROFILE
@given(data=st.data())
def test_any_value_in_a_gguf(vocab: Vocabulary, data: Any) -> None:
    entries = gguf_entries(vocab)
    keys = st.sampled_from(list(entries))
    for key in data.draw(st.lists(keys, min_size=1, max_size=2, unique=True)):
        value = data.draw(JSON_VALUES | NUMPY_VALUES)
        if isinstance(entries[key], list) and data.draw(st.booleans()):
            value = replaced(entries[key], (data.draw(st.integers(0, 9)),), value)
        entries[key] = value
    with only_our_errors():
        use(vocabulary_from_gguf(entries))


@PROFILE
@given(data=st.data())
def test_any_tokenizer_json_in_a_gguf(files: dict[str, Any], vocab: Vocabulary, data: Any) -> None:
    entries = gguf_entries(vocab)
    if data.draw(st.booleans()):
        del entries["tokenizer.ggml.pre"]
    changed = changed_at_random(data, files["tokenizer.json"])
    entries["tokenizer.huggingface.json"] = json.dumps(changed)
    with only_our_errors():
        use(vocabulary_from_gguf(entries))


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' or m.content is mapping %}"
    "{{ m['content'] | tojson }}{% else %}{{ m['role'] + ': ' + m['content'] | trim }}{% endif %}"
    "{{ eos_token }}{% endfor %}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}"
)
MESSAGES = st.lists(
    st.dictionaries(WORDS, JSON_VALUES, max_size=2).flatmap(
        lambda more: st.builds(
            lambda role, content: {**more, "role": role, "content": content},
            st.sampled_from(("user", "system", "assistant", "<|", "a b", None)),
            JSON_VALUES,
        )
    ),
    max_size=3,
)


@PROFILE
@given(messages=MESSAGES | JSON_VALUES, tools=JSON_VALUES, special=st.booleans())
def test_any_messages(vocab: Vocabulary, messages: Any, tools: Any, special: bool) -> None:
    tokenizer = Tokenizer.from_vocabulary(dataclasses.replace(vocab, chat_template=TEMPLATE))
    with only_our_errors():
        ids = tokenizer.chat(messages, tools=tools, parse_special=special)
        assert ids.count(vocab.bos or 0) == 1 or special
