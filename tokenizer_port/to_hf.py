"""The way back: Hugging Face's tokenizer files from a vocabulary."""

from __future__ import annotations

from typing import Any

from dsq.errors import InputError
from dsq.tokenizer_port.definition import added_entries, check_definition, processors
from dsq.tokenizer_port.json_file import parse_object
from dsq.tokenizer_port.pretokenize import chain_for
from dsq.tokenizer_port.vocabulary import TokenType, Vocabulary

EMBEDDED = "tokenizer.huggingface.json"  # GGUF's key for the whole tokenizer.json

_ADDED = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)


def tokenizer_json(vocab: Vocabulary) -> dict[str, Any]:
    """The content of tokenizer.json: the model's own when the vocabulary has it, else rebuilt.

    A truncation or padding left in the file by a training script is dropped: it would cut every
    text short without a word.
    """
    if vocab.tokenizer_json is None:
        return _rebuilt(vocab)
    own = parse_object(vocab.tokenizer_json, EMBEDDED)
    check_definition(own, EMBEDDED)
    tokens: dict[str, int] = dict(own["model"]["vocab"])
    added = {entry["content"]: entry["id"] for entry in added_entries(own, EMBEDDED)}
    for token, i in (*tokens.items(), *added.items()):
        if not 0 <= i < len(vocab.tokens) or vocab.tokens[i] != token:
            raise InputError(
                f"{EMBEDDED}: {token!r} has the id {i}, but in "
                "tokenizer.ggml.tokens that id is another token's; the two must agree: convert "
                "again"
            )
    new = sorted(added[token] for token in added if token not in tokens)
    if new != list(range(len(tokens), len(tokens) + len(new))):
        tokens.update(added)  # there are gaps: see _rebuilt
    return {
        **own,
        "truncation": None,
        "padding": None,
        "model": {**own["model"], "vocab": tokens},
    }


def _rebuilt(vocab: Vocabulary) -> dict[str, Any]:
    chain = chain_for(vocab.pre)
    kept = [
        (token, i, kind)
        for i, (token, kind) in enumerate(zip(vocab.tokens, vocab.types, strict=True))
        if kind != TokenType.UNUSED
    ]
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
                "normalized": False,
                "special": kind != TokenType.USER_DEFINED,
            }
            for token, i, kind in kept
            if kind in _ADDED
        ],
        "normalizer": chain["normalizer"],
        "pre_tokenizer": chain["pre_tokenizer"],
        "post_processor": chain["post_processor"],
        "decoder": chain["decoder"],
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": chain["ignore_merges"],
            # Added tokens are listed here as well: `tokenizers` ignores the ids in added_tokens
            # and numbers on from the vocabulary, which shifts them wherever rows are unused.
            "vocab": {token: i for token, i, _ in kept},
            "merges": list(vocab.merges),
        },
    }


def tokenizer_config(vocab: Vocabulary, model_max_length: int) -> dict[str, Any]:
    """The content of tokenizer_config.json for transformers' PreTrainedTokenizerFast."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": vocab.add_bos,
        "add_eos_token": vocab.add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
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
        "tokenizer.json": with_bos(tokenizer_json(vocab), vocab),
        "tokenizer_config.json": tokenizer_config(vocab, model_max_length),
        "special_tokens_map.json": special_tokens_map(vocab),
    }


def with_bos(tokenizer: dict[str, Any], vocab: Vocabulary) -> dict[str, Any]:
    """The same tokenizer.json with a post-processor that adds BOS, if the model wants one."""
    if not vocab.add_bos or vocab.bos is None:
        return tokenizer
    steps = processors(tokenizer, EMBEDDED)
    if any(step.get("type") == "TemplateProcessing" for step in steps):
        return tokenizer
    text = vocab.tokens[vocab.bos]
    bos = {"SpecialToken": {"id": text, "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, _second(bos), {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {text: {"id": text, "ids": [vocab.bos], "tokens": [text]}},
    }
    processor = {"type": "Sequence", "processors": [*steps, template]} if steps else template
    return {**tokenizer, "post_processor": processor}


def _second(bos: dict[str, Any]) -> dict[str, Any]:
    return {"SpecialToken": {**bos["SpecialToken"], "type_id": 1}}
