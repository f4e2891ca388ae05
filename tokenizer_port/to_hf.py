"""The way back: Hugging Face's tokenizer files from a vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsq.errors import InputError
from dsq.tokenizer_port.definition import (
    added_entries,
    check_definition,
    merge_texts,
    processors,
)
from dsq.tokenizer_port.json_file import expect, parse_object
from dsq.tokenizer_port.pretokenize import chain_for
from dsq.tokenizer_port.spelling import spelling_of
from dsq.tokenizer_port.vocabulary import TokenType, Vocabulary, pad_token

EMBEDDED = "tokenizer.huggingface.json"  # GGUF's key for the whole tokenizer.json

_ADDED = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)


def tokenizer_json(vocab: Vocabulary, *, published: bool = False) -> dict[str, Any]:
    """The content of tokenizer.json: the model's own when the vocabulary has it, else rebuilt.

    Rebuilt by llama.cpp's rules, or, if `published`, as the family's published file has it.
    A truncation or padding left in the file by a training script is dropped: it would cut every
    text short without a word.
    """
    if vocab.tokenizer_json is None:
        return _rebuilt(vocab, chain_for(vocab.pre, as_llama_cpp=not published))
    own = parse_object(vocab.tokenizer_json, EMBEDDED)
    check_definition(own, EMBEDDED)
    tokens: dict[str, int] = dict(own["model"]["vocab"])
    entries = added_entries(own, EMBEDDED)
    added = {entry["content"]: entry["id"] for entry in entries}
    _check_agreement(tokens, added, vocab)
    _check_types_agree({e["id"] for e in entries if e.get("special")}, {*added.values()}, vocab)
    _check_merges_agree(merge_texts(own, EMBEDDED), vocab.merges)
    new = sorted(added[token] for token in added if token not in tokens)
    if new != list(range(len(tokens), len(tokens) + len(new))):
        tokens.update(added)  # there are gaps: see Spelling.added_in_vocab
    return {
        **own,
        "truncation": None,
        "padding": None,
        "model": {**own["model"], "vocab": tokens},
    }


def _check_agreement(
    tokens: Mapping[str, int], added: Mapping[str, int], vocab: Vocabulary
) -> None:
    """Every id is the same token in tokenizer.json and in the arrays, which llama.cpp goes by."""
    for token, i in (*tokens.items(), *added.items()):
        if not 0 <= i < len(vocab.tokens) or vocab.tokens[i] != token:
            raise _disagreement(
                f"{token!r} has the id {i}, but in tokenizer.ggml.tokens that id is another token's"
            )
    known, marked = {*tokens.values(), *added.values()}, {*added.values()}
    for i, (token, kind) in enumerate(zip(vocab.tokens, vocab.types, strict=True)):
        if i not in known and kind != TokenType.UNUSED and token != pad_token(i):
            raise _disagreement(f"lacks token {i}, {token!r} in tokenizer.ggml.tokens")
        if kind == TokenType.NORMAL and i in marked:
            raise _disagreement(
                f"token {i}, {token!r}, is an added token, but tokenizer.ggml.token_type says "
                "ordinary text"
            )


def _check_types_agree(special: set[int], added: set[int], vocab: Vocabulary) -> None:
    """What is special in tokenizer.json must be out of a user's reach, what is text must not."""
    for i, (token, kind) in enumerate(zip(vocab.tokens, vocab.types, strict=True)):
        if i in special and kind not in (TokenType.CONTROL, TokenType.UNKNOWN):
            raise _disagreement(
                f"token {i}, {token!r}, is special, but tokenizer.ggml.token_type says that a "
                "user may write it"
            )
        if i not in added and kind == TokenType.USER_DEFINED:
            raise _disagreement(
                f"token {i}, {token!r}, is ordinary, but tokenizer.ggml.token_type says "
                "an added token"
            )


def _check_merges_agree(own: Sequence[str], merges: Sequence[str]) -> None:
    for i, (ours, theirs) in enumerate(zip(own, merges, strict=False)):
        if ours != theirs:
            raise _disagreement(f"merge {i} is {ours!r}, in tokenizer.ggml.merges {theirs!r}")
    if len(own) != len(merges):
        raise _disagreement(f"has {len(own)} merges, tokenizer.ggml.merges {len(merges)}")


def _disagreement(what: str) -> InputError:
    return InputError(f"{EMBEDDED}: {what}; the two must agree: convert again")


def _rebuilt(vocab: Vocabulary, chain: Mapping[str, Any]) -> dict[str, Any]:
    spelling = spelling_of(vocab.pre)
    kept = [
        (token, i, kind)
        for i, (token, kind) in enumerate(zip(vocab.tokens, vocab.types, strict=True))
        if kind != TokenType.UNUSED
    ]
    n_base = len(kept)
    if not spelling.added_in_vocab:
        while n_base and kept[n_base - 1][2] in _ADDED and kept[n_base - 1][1] == n_base - 1:
            n_base -= 1
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": chain["ignore_merges"],
        "vocab": {token: i for token, i, _ in kept[:n_base]},
        "merges": list(vocab.merges),
    }
    if not spelling.says_ignore_merges:
        del model["ignore_merges"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": spelling.added_normalized,
                "special": kind != TokenType.USER_DEFINED and token not in spelling.not_special,
            }
            for token, i, kind in kept
            if kind in _ADDED
        ],
        "normalizer": chain["normalizer"],
        "pre_tokenizer": chain["pre_tokenizer"],
        "post_processor": chain["post_processor"],
        "decoder": chain["decoder"],
        "model": model,
    }


def tokenizer_config(vocab: Vocabulary, model_max_length: int) -> dict[str, Any]:
    """The content of tokenizer_config.json for transformers' PreTrainedTokenizerFast."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": vocab.add_bos,
        "add_eos_token": vocab.add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
        # As the Llama classes have it. The plain class adds token_type_ids in transformers 4, which
        # Llama's generate() refuses, and pads on the right.
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        **special_tokens_map(vocab),
    }
    if vocab.chat_templates:
        templates = dict(vocab.chat_templates)
        if vocab.chat_template is not None:
            templates = {"default": vocab.chat_template, **templates}
        config["chat_template"] = [
            {"name": name, "template": template} for name, template in templates.items()
        ]
    elif vocab.chat_template is not None:
        config["chat_template"] = vocab.chat_template
    return config


def special_tokens_map(vocab: Vocabulary) -> dict[str, Any]:
    ids = {"bos": vocab.bos, "eos": vocab.eos, "pad": vocab.pad, "unk": vocab.unk}
    return {f"{name}_token": vocab.tokens[i] for name, i in ids.items() if i is not None}


def hf_files(vocab: Vocabulary, model_max_length: int) -> dict[str, dict[str, Any]]:
    """File name → JSON content for a Hugging Face directory.

    BOS is put into tokenizer.json's post-processor: DeepSeek's own file leaves it to
    `add_bos_token`, which transformers 5 does not read.
    """
    return {
        "tokenizer.json": with_bos(tokenizer_json(vocab, published=True), vocab),
        "tokenizer_config.json": tokenizer_config(vocab, model_max_length),
        "special_tokens_map.json": special_tokens_map(vocab),
    }


def with_bos(tokenizer: dict[str, Any], vocab: Vocabulary) -> dict[str, Any]:
    """The same tokenizer.json with a post-processor that adds BOS if the model wants one, and none
    if it does not: with the plain class, no transformers reads `add_bos_token`."""
    if vocab.bos is None:
        return tokenizer
    bos = vocab.tokens[vocab.bos]
    steps = processors(tokenizer, EMBEDDED)
    templates = [step for step in steps if step.get("type") == "TemplateProcessing"]
    if any(_is_bos(piece, bos) for step in templates for piece in step["single"]) == vocab.add_bos:
        return tokenizer
    if not templates:
        templates = [_PLAIN_TEMPLATE]
        steps = [*steps, _PLAIN_TEMPLATE]
    new = [_template(step, bos, vocab) if step in templates else step for step in steps]
    processor = {"type": "Sequence", "processors": new} if len(new) > 1 else new[0]
    return {**tokenizer, "post_processor": processor}


_PLAIN_TEMPLATE: dict[str, Any] = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}


def _template(step: dict[str, Any], bos: str, vocab: Vocabulary) -> dict[str, Any]:
    """The step with BOS before each text, or without any."""
    what = f"{EMBEDDED}: post_processor: TemplateProcessing"
    special = expect(step.get("special_tokens"), dict, f"{what}.special_tokens")
    if vocab.add_bos:
        special = {**special, bos: {"id": bos, "ids": [vocab.bos], "tokens": [bos]}}
    new = {**step, "special_tokens": special, "single": [], "pair": []}
    for key in ("single", "pair"):
        for piece in expect(step.get(key), list, f"{what}.{key}"):
            sequence = expect(piece, dict, f"{what}.{key}: a piece").get("Sequence")
            if vocab.add_bos and isinstance(sequence, dict):
                new[key].append({"SpecialToken": {**sequence, "id": bos}})
            if not _is_bos(piece, bos):
                new[key].append(piece)
    return new


def _is_bos(piece: dict[str, Any], bos: str) -> bool:
    special = piece.get("SpecialToken")
    return isinstance(special, dict) and special.get("id") == bos
