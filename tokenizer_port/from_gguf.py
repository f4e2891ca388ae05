"""Read a vocabulary from a GGUF's metadata."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from dsq.errors import InputError, UnsupportedError
from dsq.tokenizer_port import special
from dsq.tokenizer_port.pretokenize import ADDS_BOS_UNSAID, checked_name, recognise
from dsq.tokenizer_port.vocabulary import TokenType, Vocabulary, check_unique, pad_token

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"

# FIM keys and their names before September 2024.
_FIM_KEYS = (
    ("fim_pre_token_id", "prefix_token_id"),
    ("fim_suf_token_id", "suffix_token_id"),
    ("fim_mid_token_id", "middle_token_id"),
)


def vocabulary_from_gguf(metadata: Mapping[str, Any], *, pre: str | None = None) -> Vocabulary:
    """The vocabulary in a GGUF's `tokenizer.*` keys; `pre` overrides `tokenizer.ggml.pre`.

    `metadata` maps keys to Python values; arrays are lists or numpy arrays.
    Raises InputError for missing or contradictory keys, UnsupportedError for other tokenizers.
    """
    model = metadata.get(_PREFIX + "model")
    if model is None:
        raise InputError(f"{_PREFIX}model: missing: this GGUF has no tokenizer; convert again")
    if model != "gpt2":
        raise UnsupportedError(
            f'{_PREFIX}model: is {model!r}; only "gpt2" (byte-level BPE) is supported'
        )
    tokens = [str(token) for token in _array(metadata, "tokens")]
    check_unique(tokens, _PREFIX + "tokens")
    index = {token: i for i, token in enumerate(tokens)}
    reader = _Ids(metadata, len(tokens))
    fim = [reader.get(*keys) for keys in _FIM_KEYS]
    if None in fim:
        fim = list(special.find_fim(index))
    tokenizer_json = metadata.get("tokenizer.huggingface.json")
    name = checked_name(pre) if pre else _pre(metadata, tokenizer_json, index)
    bos = reader.get("bos_token_id")
    eot = reader.get("eot_token_id")
    add_bos = metadata.get(_PREFIX + "add_bos_token", name in ADDS_BOS_UNSAID)
    add_space = metadata.get(_PREFIX + "add_space_prefix")
    return Vocabulary(
        model="gpt2",
        pre=name,
        tokens=tuple(tokens),
        types=tuple(_types(metadata, tokens)),
        merges=tuple(str(merge) for merge in _array(metadata, "merges")),
        bos=bos,
        eos=reader.get("eos_token_id"),
        eot=special.find_end_of_turn(index) if eot is None else eot,
        pad=reader.get("padding_token_id"),
        unk=reader.get("unknown_token_id"),
        fim_prefix=fim[0],
        fim_suffix=fim[1],
        fim_middle=fim[2],
        add_bos=bool(add_bos) and bos is not None,
        add_eos=bool(metadata.get(_PREFIX + "add_eos_token", False)),
        add_space_prefix=None if add_space is None else bool(add_space),
        chat_template=metadata.get(_TEMPLATE),
        chat_templates={
            key.removeprefix(_TEMPLATE + "."): str(value)
            for key, value in metadata.items()
            if key.startswith(_TEMPLATE + ".")
        },
        tokenizer_json=tokenizer_json,
    )


def _array(metadata: Mapping[str, Any], key: str) -> Iterable[Any]:
    value = metadata.get(_PREFIX + key)
    if value is None:
        raise InputError(
            f"{_PREFIX}{key}: missing, and the tokenizer cannot be read without it; convert again"
        )
    if isinstance(value, (str, bytes)) or not hasattr(value, "__len__") or len(value) == 0:
        raise InputError(f"{_PREFIX}{key}: is {value!r}, a list is needed; convert again")
    items: Iterable[Any] = value.tolist() if hasattr(value, "tolist") else value
    return items


def _types(metadata: Mapping[str, Any], tokens: list[str]) -> list[int]:
    """The token types, with the errors of older converters mended.

    They call padding and DeepSeek's FIM and EOT markers USER_DEFINED, so that a user who types
    `<|EOT|>` would end the turn.
    """
    if metadata.get(_PREFIX + "token_type") is None:
        return [int(_type_unsaid(token)) for token in tokens]
    types = [int(kind) for kind in _array(metadata, "token_type")]
    if len(types) != len(tokens):
        raise InputError(
            f"{_PREFIX}token_type: has {len(types)} entries, but {_PREFIX}tokens has "
            f"{len(tokens)}; they must be equal: convert again"
        )
    for i, token in enumerate(tokens):
        if types[i] == TokenType.USER_DEFINED:
            if token == pad_token(i):
                types[i] = TokenType.UNUSED
            elif special.looks_special(token):
                types[i] = TokenType.CONTROL
    return [int(kind) for kind in types]


def _type_unsaid(token: str) -> TokenType:
    return TokenType.CONTROL if special.looks_special(token) else TokenType.NORMAL


def _pre(metadata: Mapping[str, Any], tokenizer_json: Any, index: Mapping[str, int]) -> str:
    """`tokenizer.ggml.pre`; files made before April 2024 lack it and are tokenized wrongly."""
    name = metadata.get(_PREFIX + "pre")
    if isinstance(name, str) and name not in ("", "default"):
        return name
    if isinstance(tokenizer_json, str):
        return recognise(json.loads(tokenizer_json))
    guess = "deepseek-coder" if "<｜fim▁hole｜>" in index and "û" in index else "NAME"
    raise InputError(
        f"{_PREFIX}pre: is {name!r}, as in files made before April 2024: every current runtime "
        f"would tokenize wrongly; say which pre-tokenizer it is with --pre {guess}"
    )


class _Ids:
    def __init__(self, metadata: Mapping[str, Any], n_tokens: int) -> None:
        self._metadata = metadata
        self._n_tokens = n_tokens

    def get(self, *keys: str) -> int | None:
        """The id under the first of the keys that is there."""
        for key in keys:
            value = self._metadata.get(_PREFIX + key)
            if value is None:
                continue
            if not 0 <= int(value) < self._n_tokens:
                raise InputError(
                    f"{_PREFIX}{key}: is {value}, but there are {self._n_tokens} tokens; "
                    "an id must be one of them: convert again"
                )
            return int(value)
        return None
