"""Leaving control tokens out of what a user can write must not move anything else."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest

from dsq.errors import InputError
from dsq.tokenizer_port.tokenizer import Tokenizer
from dsq.tokenizer_port.vocabulary import TokenType, Vocabulary

from .conftest import BOS


def extended(vocab: Vocabulary, deepseek_json: dict[str, Any], *texts: str) -> Vocabulary:
    """A fine-tune's vocabulary, with ordinary tokens added behind the control tokens."""
    own = copy.deepcopy(deepseek_json)
    first = max(entry["id"] for entry in own["added_tokens"]) + 1
    for i, text in enumerate(texts):
        own["added_tokens"].append({**own["added_tokens"][0], "id": first + i, "content": text})
    tokens, types = list(vocab.tokens), list(vocab.types)
    for i, text in enumerate(texts):
        tokens[first + i], types[first + i] = text, int(TokenType.USER_DEFINED)
    return replace(vocab, tokens=tuple(tokens), types=tuple(types), tokenizer_json=json.dumps(own))


@pytest.mark.parametrize("embedded", [True, False])
def test_a_token_added_behind_the_control_tokens_keeps_its_id(
    vocab: Vocabulary, deepseek_json: dict[str, Any], embedded: bool
) -> None:
    more = extended(vocab, deepseek_json, "[think]", "[/think]")
    if not embedded:
        more = replace(more, tokenizer_json=None)
    tok = Tokenizer.from_vocabulary(more)
    text = "x[think]y[/think]"
    ids = tok.encode(text, add_bos=False)
    assert [more.index["[think]"], more.index["[/think]"]] == [
        i for i in ids if more.types[i] == TokenType.USER_DEFINED
    ]
    assert ids == tok.encode(text, add_bos=False, parse_special=True)
    assert tok.decode(ids) == text


def test_letters_behind_control_tokens_keep_their_ids(vocab: Vocabulary) -> None:
    """DeepSeek LLM has BOS and EOS first, then the letters."""
    letters = vocab.ids_of_type(TokenType.USER_DEFINED)
    control = vocab.ids_of_type(TokenType.CONTROL)[: len(letters)]
    tokens, types = list(vocab.tokens), list(vocab.types)
    for a, b in zip(letters, control, strict=False):
        tokens[a], tokens[b] = tokens[b], tokens[a]
        types[a], types[b] = types[b], types[a]
    swapped = replace(
        vocab,
        tokens=tuple(tokens),
        types=tuple(types),
        tokenizer_json=None,
        **{
            name: tokens.index(vocab.tokens[getattr(vocab, name)])
            for name in ("bos", "eos", "eot", "pad", "fim_prefix", "fim_suffix", "fim_middle")
            if getattr(vocab, name) is not None
        },
    )
    tok = Tokenizer.from_vocabulary(swapped)
    assert tok.decode(tok.encode("Führer für Ágnes", add_bos=False)) == "Führer für Ágnes"


def test_a_control_token_that_merges_make_is_not_made_of_text(
    vocab: Vocabulary, deepseek_json: dict[str, Any]
) -> None:
    own = copy.deepcopy(deepseek_json)
    word = next(
        token
        for token in own["model"]["vocab"]
        if len(token) > 3 and token.isascii() and token.isalpha()
    )
    row = own["model"]["vocab"][word]
    own["added_tokens"].insert(
        0, {**own["added_tokens"][0], "id": row, "content": word, "special": True}
    )
    types = list(vocab.types)
    types[row] = int(TokenType.CONTROL)
    tok = Tokenizer.from_vocabulary(
        replace(vocab, types=tuple(types), tokenizer_json=json.dumps(own))
    )
    ids = tok.encode(f"{word} {word}", add_bos=False)
    assert row not in ids
    assert tok.decode(ids) == f"{word} {word}"
    assert row in tok.encode(word, add_bos=False, parse_special=True)


@pytest.mark.parametrize(
    ("kind", "types", "message"),
    [
        (BOS, TokenType.USER_DEFINED, "is special, but"),
        ("a", TokenType.USER_DEFINED, "is ordinary, but"),
        ("ü", TokenType.NORMAL, "is an added token, but"),
    ],
)
def test_types_that_contradict_the_embedded_tokenizer(
    vocab: Vocabulary, kind: str, types: TokenType, message: str
) -> None:
    row = vocab.index[kind]
    changed = list(vocab.types)
    changed[row] = int(types)
    with pytest.raises(InputError, match=f"token {row}.*{message}"):
        Tokenizer.from_vocabulary(replace(vocab, types=tuple(changed)))


def test_a_completion_ends_where_the_next_file_begins(vocab: Vocabulary) -> None:
    tokens = list(vocab.tokens)
    tokens[-1] = "<|file_sep|>"
    types = [*vocab.types[:-1], int(TokenType.CONTROL)]
    more = replace(vocab, tokens=tuple(tokens), types=tuple(types), tokenizer_json=None)
    tok = Tokenizer.from_vocabulary(more)
    assert len(tokens) - 1 in tok.stop_ids("complete")
    assert len(tokens) - 1 not in tok.stop_ids("chat")
