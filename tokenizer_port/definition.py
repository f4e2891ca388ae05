"""What dsq reads of a tokenizer.json, checked for its shape before anything is taken from it.

What only the tokenizers library reads is left for it to refuse (`tokenizer.Tokenizer`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsq.errors import InputError, UnsupportedError
from dsq.tokenizer_port.json_file import brief, expect, optional
from dsq.tokenizer_port.pretokenize import chain_of


def check_definition(tokenizer: Mapping[str, Any], where: str) -> None:
    """Raise InputError unless every part has the type that a BPE tokenizer.json gives it.

    UnsupportedError for marks on parts of words, which GGUF cannot tell of.
    """
    model = expect(tokenizer.get("model"), dict, f"{where}: model")
    vocab = expect(model.get("vocab"), dict, f"{where}: model.vocab")
    if not vocab:
        raise InputError(f"{where}: model.vocab has no token; download or convert the model again")
    for text, row in vocab.items():
        if type(row) is not int:
            raise InputError(
                f"{where}: token {text!r} has the id {brief(row)}, no row number; "
                "download or convert the model again"
            )
    optional(model.get("merges"), list, f"{where}: model.merges")
    optional(model.get("unk_token"), str, f"{where}: model.unk_token")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UnsupportedError(
                f"{where}: model.{key} is {brief(model[key])}; "
                "byte-level BPE in GGUF has no such mark"
            )
    for i, entry in enumerate(added_entries(tokenizer, where)):
        what = f"{where}: added_tokens[{i}]"
        expect(entry, dict, what)
        expect(entry.get("id"), int, f"{what}.id")
        if not expect(entry.get("content"), str, f"{what}.content"):
            raise InputError(f"{what}.content is ''; a token has a text: remove the entry")
        optional(entry.get("special"), bool, f"{what}.special")
    optional(tokenizer.get("decoder"), dict, f"{where}: decoder")
    chain_of(tokenizer, where)
    processors(tokenizer, where)


def added_entries(tokenizer: Mapping[str, Any], where: str) -> list[Any]:
    """`added_tokens`; a file without any may leave it out."""
    return optional(tokenizer.get("added_tokens"), list, f"{where}: added_tokens") or []


def processors(tokenizer: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The steps of the post-processor, which adds BOS and EOS in some files."""
    what = f"{where}: post_processor"
    own = optional(tokenizer.get("post_processor"), dict, what)
    if own is None:
        return []
    steps = [own]
    if own.get("type") == "Sequence":
        what += ".processors"
        steps = expect(own.get("processors"), list, what)
    for step in steps:
        expect(step, dict, f"{what}: a step")
        if step.get("type") == "TemplateProcessing":
            for piece in expect(step.get("single"), list, f"{what}: TemplateProcessing.single"):
                expect(piece, dict, f"{what}: a piece of TemplateProcessing.single")
    return steps


def merge_texts(tokenizer: Mapping[str, Any], where: str) -> list[str]:
    """`model.merges` in both spellings, "a b" and ["a", "b"], as "a b"."""
    found = []
    for i, merge in enumerate(tokenizer["model"].get("merges") or []):
        if isinstance(merge, str) and merge.count(" ") == 1 and merge[0] != " " != merge[-1]:
            found.append(merge)  # the common case, tens of thousands of times
            continue
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(pair, list) and len(pair) == 2 and all(_is_word(p) for p in pair)):
            raise InputError(
                f"{where}: merge {i} is {brief(merge)}, not two tokens with one space; "
                "download or convert the model again"
            )
        found.append(f"{pair[0]} {pair[1]}")
    return found


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value != "" and " " not in value
