"""Read a vocabulary from a Hugging Face directory (`from_gguf` has the way from a GGUF)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsq.errors import InputError, UnsupportedError
from dsq.tokenizer_port import special
from dsq.tokenizer_port.definition import added_entries, check_definition, merge_texts
from dsq.tokenizer_port.from_gguf import vocabulary_from_gguf
from dsq.tokenizer_port.hf_settings import (
    SpecialIds,
    adds,
    chat_templates,
    decoder_entries,
    is_special,
    read_json,
    read_settings,
    read_text,
    token_text,
)
from dsq.tokenizer_port.json_file import brief, expect, parse_object
from dsq.tokenizer_port.pretokenize import checked_name, recognise
from dsq.tokenizer_port.vocabulary import (
    TokenType,
    Vocabulary,
    check_merges,
    check_unique,
    pad_token,
)

__all__ = ["load_hf", "vocabulary_from_gguf"]


@dataclass(frozen=True)
class _Added:
    id: int
    text: str
    special: bool


def load_hf(
    directory: Path,
    n_rows: int,
    *,
    pre: str | None = None,
    config: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
) -> Vocabulary:
    """The vocabulary of a model directory, padded to `n_rows`, the rows of the embedding.

    `pre` overrides the recognition of the pre-tokenizer. The ids of BOS, EOS and pad are taken
    from tokenizer_config.json, special_tokens_map.json, `config`, `generation_config`, in order.
    Raises InputError for files that contradict themselves, UnsupportedError for other tokenizers.
    """
    path = directory / "tokenizer.json"
    text = _read_tokenizer_json(path)
    tokenizer = parse_object(text, str(path))
    settings = read_settings(directory / "tokenizer_config.json")
    check_tokenizer(tokenizer, path)

    added = _added_tokens(path, tokenizer)
    missing = _missing_added(directory, settings, added)
    if missing:
        # Some fine-tunes keep their tokens in added_tokens.json only; transformers adds them.
        added.update(missing)
        tokenizer["added_tokens"] = [
            *added_entries(tokenizer, str(path)),
            *(_added_entry(token) for token in missing.values()),
        ]
        text = json.dumps(tokenizer, ensure_ascii=False)

    merges = merge_texts(tokenizer, str(path))
    check_merges(merges, tokenizer["model"]["vocab"], str(path))
    tokens, types = _rows(path, tokenizer["model"]["vocab"], added, settings, n_rows)
    index = {token: i for i, token in enumerate(tokens)}
    ids = SpecialIds(directory, index, settings, config or {}, generation_config or {})
    bos = ids.find("bos", required=True)
    fim_prefix, fim_suffix, fim_middle = special.find_fim(index)
    template, templates = chat_templates(directory, settings)
    return Vocabulary(
        model="gpt2",
        pre=checked_name(pre) if pre else recognise(tokenizer, str(path)),
        tokens=tuple(tokens),
        types=tuple(types),
        merges=tuple(merges),
        bos=bos,
        eos=ids.find("eos", required=True),
        eot=special.find_end_of_turn(index),
        pad=ids.find("pad"),
        unk=ids.find("unk"),
        fim_prefix=fim_prefix,
        fim_suffix=fim_suffix,
        fim_middle=fim_middle,
        add_bos=adds(directory, settings, tokenizer, "bos", bos),
        add_eos=adds(directory, settings, tokenizer, "eos", None),
        add_space_prefix=settings.get("add_prefix_space"),
        chat_template=template,
        chat_templates=templates,
        tokenizer_json=text,
    )


def _read_tokenizer_json(path: Path) -> str:
    if path.is_file():
        return read_text(path)
    if path.is_dir():
        raise InputError(
            f"{path}: is a directory; put the file tokenizer.json of the model in its place"
        )
    if any((path.parent / name).is_file() for name in ("tokenizer.model", "spiece.model")):
        raise UnsupportedError(
            f"{path}: not found, and a SentencePiece tokenizer.model alone is not supported; save "
            "the fast tokenizer once with transformers (AutoTokenizer...save_pretrained)"
        )
    raise InputError(f"{path}: not found; copy tokenizer.json from the model it was made from")


def check_tokenizer(tokenizer: Mapping[str, Any], path: Path) -> None:
    """Raise InputError for a malformed definition, UnsupportedError for no byte-level BPE."""
    model = expect(tokenizer.get("model"), dict, f"{path}: model")
    kind = model.get("type", "BPE")  # files of tokenizers < 0.10 do not say it
    if kind != "BPE":
        raise UnsupportedError(
            f"{path}: model.type is {brief(kind)}; only byte-level BPE is supported"
        )
    check_definition(tokenizer, str(path))
    chain = [tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")]
    steps = json.dumps(chain, ensure_ascii=False)
    if model.get("byte_fallback") or ("ByteLevel" not in steps and "▁" in steps):
        raise UnsupportedError(
            f"{path}: is SentencePiece-style BPE (byte_fallback, as in Llama 2 and CodeLlama); "
            "only byte-level BPE is supported: convert this model with llama.cpp's own converter"
        )
    if "ByteLevel" not in steps:
        raise UnsupportedError(
            f"{path}: no step of normalizer and pre_tokenizer is ByteLevel (pre_tokenizer is "
            f"{brief(chain[1])}); only byte-level BPE is supported: if the file was edited, "
            "download it again"
        )


def _added_entry(token: _Added) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token.id, "content": token.text, **flags, "special": token.special}


def _added_tokens(path: Path, tokenizer: Mapping[str, Any]) -> dict[str, _Added]:
    found: dict[str, _Added] = {}
    for entry in added_entries(tokenizer, str(path)):
        token = _Added(entry["id"], entry["content"], bool(entry.get("special")))
        _add(path, found, token)
    return found


def _add(path: Path, found: dict[str, _Added], token: _Added) -> None:
    if not token.text:
        raise InputError(f"{path}: the added token {token.id} has no text; remove the entry")
    earlier = found.setdefault(token.text, token)
    if earlier.id != token.id:
        raise InputError(
            f"{path}: added token {token.text!r} has the ids {earlier.id} and {token.id}; "
            "a token has one: remove the wrong entry"
        )


def _missing_added(
    directory: Path, settings: Mapping[str, Any], added: Mapping[str, _Added]
) -> dict[str, _Added]:
    """Tokens of added_tokens.json and `added_tokens_decoder` that tokenizer.json lacks."""
    path = directory / "added_tokens.json"
    found: dict[str, _Added] = {}
    for text, row in read_json(path).items():
        expect(row, int, f"{path}: the id of {text!r}", "correct it")
        _add(path, found, _Added(row, text, special=False))
    path = directory / "tokenizer_config.json"
    for key, entry in decoder_entries(path, settings).items():
        content = token_text(entry) or ""
        _add(path, found, _Added(int(key), content, special=is_special(entry)))
    for token in found.values():
        if token.text in added:
            _add(path, {token.text: added[token.text]}, token)
    return {text: token for text, token in found.items() if text not in added}


def _rows(
    path: Path,
    vocab: Mapping[str, Any],
    added: Mapping[str, _Added],
    settings: Mapping[str, Any],
    n_rows: int,
) -> tuple[list[str], list[int]]:
    """Token texts and types by id, rows without a token padded as unused."""
    rows: dict[int, str] = {}
    entries = [*vocab.items(), *((t.text, t.id) for t in added.values())]
    for text, row in entries:
        if row < 0:
            raise InputError(
                f"{path}: token {text!r} has the id {row}, no row number; correct the id"
            )
        if rows.setdefault(row, text) != text:
            raise InputError(
                f"{path}: id {row} belongs to {rows[row]!r} and to {text!r}; "
                "an id has one token: give the added token an id of its own"
            )
    if rows and max(rows) >= n_rows:
        last = max(rows)
        raise InputError(
            f"{path}: a vocabulary larger than the rows: token {rows[last]!r} has the id {last}, "
            f"but the embedding has {n_rows} rows; the tokenizer belongs to another model, or the "
            "embedding was not resized after tokens were added"
        )
    marked = {
        content
        for entry in decoder_entries(path, settings).values()
        if is_special(entry) and (content := token_text(entry)) is not None
    }
    tokens = [rows.get(i, pad_token(i)) for i in range(n_rows)]
    check_unique(tokens, str(path))
    types = [
        int(_type_of(tokens[i], added, marked) if i in rows else TokenType.UNUSED)
        for i in range(n_rows)
    ]
    return tokens, types


def _type_of(text: str, added: Mapping[str, _Added], marked: set[str]) -> TokenType:
    token = added.get(text)
    if token is None:
        return TokenType.NORMAL
    if token.special or text in marked or special.looks_special(text):
        return TokenType.CONTROL
    return TokenType.USER_DEFINED
