"""Read a vocabulary from a GGUF's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

from dsq.errors import InputError, UnsupportedError
from dsq.tokenizer_port import special
from dsq.tokenizer_port.chains import ADDS_BOS_UNSAID
from dsq.tokenizer_port.definition import check_definition
from dsq.tokenizer_port.json_file import brief, expect, optional, parse_object
from dsq.tokenizer_port.pretokenize import checked_name, recognise
from dsq.tokenizer_port.vocabulary import (
    TokenType,
    Vocabulary,
    check_merges,
    check_unique,
    pad_token,
)

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_JSON = "tokenizer.huggingface.json"
_AGAIN = "convert again"

# FIM keys and their names before September 2024.
_FIM_KEYS = (
    ("fim_pre_token_id", "prefix_token_id"),
    ("fim_suf_token_id", "suffix_token_id"),
    ("fim_mid_token_id", "middle_token_id"),
)


def vocabulary_from_gguf(
    metadata: Mapping[str, Any], *, pre: str | None = None, allow_default: bool = False
) -> Vocabulary:
    """The vocabulary in a GGUF's `tokenizer.*` keys; `pre` overrides `tokenizer.ggml.pre`.

    `allow_default` takes a file that names no pre-tokenizer as llama.cpp takes it, whose rule
    "default" then is: good for running such a file, never for making another one of it.

    `metadata` maps keys to Python values; arrays are lists or numpy arrays.
    Raises InputError for missing, mistyped or contradictory keys, UnsupportedError for other
    tokenizers. The tokenizer.json inside is read only where `pre` is to be found in it.
    """
    _check_model(metadata)
    tokens = _strings(metadata, "tokens")
    check_unique(tokens, _PREFIX + "tokens")
    index = {token: i for i, token in enumerate(tokens)}
    reader = _Ids(metadata, len(tokens))
    fim = [reader.get(*keys) for keys in _FIM_KEYS]
    if None in fim:
        fim = list(special.find_fim(index))
    tokenizer_json = optional(metadata.get(_JSON), str, _JSON, _AGAIN)
    name = checked_name(pre) if pre else _pre(metadata, tokenizer_json)
    if name is None:
        if not allow_default:
            raise _no_pre(metadata, index)
        name = "default"
    merges = _strings(metadata, "merges")
    check_merges(merges, index, _PREFIX + "merges")
    bos = reader.get("bos_token_id")
    eot = reader.get("eot_token_id")
    add_bos = _flag(metadata, "add_bos_token")
    if add_bos is None:
        add_bos = name in ADDS_BOS_UNSAID
    return Vocabulary(
        model="gpt2",
        pre=name,
        tokens=tuple(tokens),
        types=tuple(_types(metadata, tokens)),
        merges=tuple(merges),
        bos=bos,
        eos=reader.get("eos_token_id"),
        eot=special.find_end_of_turn(index) if eot is None else eot,
        pad=reader.get("padding_token_id"),
        unk=reader.get("unknown_token_id"),
        fim_prefix=fim[0],
        fim_suffix=fim[1],
        fim_middle=fim[2],
        add_bos=add_bos and bos is not None,
        add_eos=bool(_flag(metadata, "add_eos_token")),
        add_space_prefix=_flag(metadata, "add_space_prefix"),
        chat_template=optional(metadata.get(_TEMPLATE), str, _TEMPLATE, _AGAIN),
        chat_templates={
            key.removeprefix(_TEMPLATE + "."): expect(value, str, key, _AGAIN)
            for key, value in metadata.items()
            if key.startswith(_TEMPLATE + ".")
        },
        tokenizer_json=tokenizer_json,
    )


def _check_model(metadata: Mapping[str, Any]) -> None:
    model = optional(metadata.get(_PREFIX + "model"), str, _PREFIX + "model", _AGAIN)
    if model is None:
        raise InputError(f"{_PREFIX}model: missing: this GGUF has no tokenizer; convert again")
    if model != "gpt2":
        raise UnsupportedError(
            f'{_PREFIX}model: is {model!r}; only "gpt2" (byte-level BPE) is supported'
        )


def _flag(metadata: Mapping[str, Any], key: str) -> bool | None:
    return optional(metadata.get(_PREFIX + key), bool, _PREFIX + key, _AGAIN)


def _array(metadata: Mapping[str, Any], key: str) -> list[Any]:
    value = metadata.get(_PREFIX + key)
    if value is None:
        raise InputError(
            f"{_PREFIX}{key}: missing, and the tokenizer cannot be read without it; convert again"
        )
    items = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(items, (list, tuple)):
        raise InputError(f"{_PREFIX}{key}: is {brief(value)}, a list is needed; convert again")
    if not items:
        raise InputError(f"{_PREFIX}{key}: has no entries; convert again")
    return list(items)


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    items = _array(metadata, key)
    for i, item in enumerate(items):
        if not isinstance(item, str):
            raise InputError(
                f"{_PREFIX}{key}: entry {i} is {brief(item)}, a string is needed; convert again"
            )
    return items


def _types(metadata: Mapping[str, Any], tokens: list[str]) -> list[int]:
    """The token types, with the errors of older converters mended.

    They call padding and DeepSeek's FIM and EOT markers USER_DEFINED, so that a user who types
    `<|EOT|>` would end the turn.
    """
    if metadata.get(_PREFIX + "token_type") is None:
        return [int(_type_unsaid(token)) for token in tokens]
    types = _array(metadata, "token_type")
    for i, kind in enumerate(types):
        if not _is_integer(kind):
            raise InputError(
                f"{_PREFIX}token_type: entry {i} is {brief(kind)}, a whole number is needed; "
                "convert again"
            )
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


def _is_integer(value: Any) -> bool:
    """Of Python or of numpy; a bool is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _pre(metadata: Mapping[str, Any], tokenizer_json: str | None) -> str | None:
    """`tokenizer.ggml.pre`, or the name that the tokenizer.json inside goes by."""
    name = optional(metadata.get(_PREFIX + "pre"), str, _PREFIX + "pre", _AGAIN)
    if name is not None and name not in ("", "default"):
        return name
    if tokenizer_json is None:
        return None
    definition = parse_object(tokenizer_json, _JSON)
    check_definition(definition, _JSON)
    return recognise(definition, _JSON)


def _no_pre(metadata: Mapping[str, Any], index: Mapping[str, int]) -> InputError:
    known = "<｜fim▁hole｜>" in index and "û" in index
    guess, again = ("deepseek-coder", "") if known else ("NAME", " --pre NAME")
    return InputError(
        f"{_PREFIX}pre: is {metadata.get(_PREFIX + 'pre')!r}, as in files made before April 2024: "
        "every current runtime would tokenize wrongly; say which pre-tokenizer it is with "
        f"--pre {guess}, or mend the file first: dsq doctor FILE --fix OUT{again}"
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
            if not _is_integer(value):
                raise InputError(
                    f"{_PREFIX}{key}: is {brief(value)}, a whole number is needed; convert again"
                )
            if not 0 <= value < self._n_tokens:
                raise InputError(
                    f"{_PREFIX}{key}: is {value}, but there are {self._n_tokens} tokens; "
                    "an id must be one of them: convert again"
                )
            return int(value)
        return None
