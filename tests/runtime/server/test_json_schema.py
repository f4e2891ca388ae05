"""JSON schemas as grammars, judged by llama.cpp's own grammar engine."""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsq.errors import InputError
from dsq.runtime.llama_log import install
from dsq.runtime.server.json_schema import schema_to_gbnf
from dsq.tokenizer_port.tokenizer import Tokenizer
from tests.tiny_gguf import EOS, token_id

Accepts = Callable[[Any, str], bool]


@pytest.fixture(scope="module")
def accepts(tiny: Path, tokenizer: Tokenizer) -> Iterator[Accepts]:
    """Whether llama.cpp lets a model write the text, and end there, under a schema's grammar."""
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    install(verbose=False)
    model = llama_cpp.llama_model_load_from_file(str(tiny).encode(), params)
    vocab = llama_cpp.llama_model_get_vocab(model)

    def judge(schema: Any, text: str) -> bool:
        grammar = schema_to_gbnf(schema).encode()
        sampler = llama_cpp.llama_sampler_init_grammar(vocab, grammar, b"root")
        assert sampler, f"llama.cpp refuses the grammar:\n{grammar.decode()}"
        try:
            for token in [*tokenizer.encode(text, add_bos=False), token_id(EOS)]:
                one = (llama_cpp.llama_token_data * 1)(llama_cpp.llama_token_data(token, 0.0, 0.0))
                array = llama_cpp.llama_token_data_array(
                    data=ctypes.cast(one, ctypes.POINTER(llama_cpp.llama_token_data)),
                    size=1,
                    selected=-1,
                    sorted=False,
                )
                llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
                if one[0].logit == -math.inf:
                    return False
                if token != token_id(EOS):
                    llama_cpp.llama_sampler_accept(sampler, token)
            return True
        finally:
            llama_cpp.llama_sampler_free(sampler)

    yield judge
    llama_cpp.llama_model_free(model)


PERSON = {
    "type": "object",
    "title": "A person",
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["a", "b c"]}, "maxItems": 2},
        "boss": {"anyOf": [{"type": "null"}, {"$ref": "#"}]},
    },
    "required": ["age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (
            PERSON,
            [
                {"age": 1},
                {"name": "é€", "age": -20},
                {"age": 0, "tags": []},
                {"age": 0, "tags": ["a", "b c"], "boss": None},
                {"age": 3, "boss": {"age": 4}},
            ],
            [
                *({}, {"name": "x"}, {"age": "1"}, {"age": 1.5}, {"name": "", "age": 1}),
                *({"age": 1, "tags": ["a", "a", "a"]}, {"age": 1, "tags": ["c"]}, [], {"x": 1}),
                {"age": 1, "boss": {}},
            ],
        ),
        ({"type": ["integer", "null"]}, [1, None], ["1", True]),
        ({"const": {"a": ['"\\\n', 1]}}, [{"a": ['"\\\n', 1]}], [{"a": []}]),
        ({"type": "array", "minItems": 2, "maxItems": 3}, [[1, {}], [1, 2, 3]], [[1], [1] * 4]),
        ({"type": "array", "maxItems": 0}, [[]], [[1]]),
        ({"type": "array", "prefixItems": [{"type": "null"}, {}]}, [[None, [1]]], [[None], [1, 2]]),
        ({"items": [{"type": "null"}, {"type": "integer"}]}, [[None, 1]], [[None], [1, 2]]),  # old
        ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "\n\té"], ["a", "abcd"]),
        ({"type": "string", "format": "date"}, ["2026-02-28"], ["2026-13-01", "x"]),
        ({"type": "string", "format": "date-time"}, ["2026-02-28T23:59:00Z"], ["2026-02-28"]),
        (
            {"type": "object", "additionalProperties": {"type": "boolean"}},
            [{}, {"x": True, "y": False}],
            [{"x": 1}],
        ),
        (
            {"$defs": {"t/n": {"type": "array", "items": {"$ref": "#/$defs/t~1n"}}},
             "$ref": "#/$defs/t~1n"},
            [[], [[], [[]]]],
            [[1], {}],
        ),
    ],
)  # fmt: skip
def test_what_a_schema_lets_through(
    accepts: Accepts, schema: Any, good: list[Any], bad: list[Any]
) -> None:
    for value in good:
        assert accepts(schema, json.dumps(value, ensure_ascii=False)), value
        if "const" not in schema:  # which is one text, spaces and all
            assert accepts(schema, json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    for value in bad:
        assert not accepts(schema, json.dumps(value, ensure_ascii=False)), value


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e6, 1e6) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, max_examples=50)
@given(value=VALUES)
def test_any_json_passes_the_empty_schema_and_its_own_constant(
    accepts: Accepts, value: Any
) -> None:
    text = json.dumps(value, ensure_ascii=False)
    if "\x7f" not in text:  # llama.cpp's own JSON grammar leaves DEL out too
        assert accepts({}, text)
    assert accepts({"const": value}, text)
    assert not accepts({}, text + "x")


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "pattern": "a+"}, "'pattern' is not supported"),
        ({"type": "integer", "minimum": 3}, "'minimum' is not supported"),
        ({"allOf": [{}]}, "'allOf' is not supported"),
        ({"type": "string", "format": "email"}, "email"),
        ({"$ref": "http://elsewhere/x"}, "out of the document"),
        ({"$ref": "#/nothing"}, "not there"),
        ({"$ref": "#"}, "nothing but itself"),
        ({"type": "object", "required": ["a"]}, "requires 'a'"),
        ({"type": "cat"}, "'cat'"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "impossible"),
        ({"type": "array", "minItems": 10**9}, "minItems"),
        ({"enum": []}, "enum"),
        (7, "no schema"),
    ],
)
def test_what_a_grammar_cannot_hold_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        schema_to_gbnf(schema)


def test_a_schema_that_is_nested_without_end() -> None:
    schema: Any = {}
    for _ in range(500):
        schema = {"type": "array", "items": schema}
    with pytest.raises(InputError, match="nested"):
        schema_to_gbnf(schema)
