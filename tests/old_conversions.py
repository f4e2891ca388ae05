"""tiny-coder as careless converters write it: its metadata with one fault, or with several."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.gguf.metadata import F32, STRING, U32, KeyValue
from dsq.convert.gguf.reader import read_gguf
from dsq.convert.gguf.rewrite import rewrite_gguf
from dsq.convert.pipeline import plan_gguf, run_gguf_plan
from dsq.quant.presets import PRESETS
from tests.models import TINY_CODER

Metadata = dict[str, Any]
Fault = Callable[[Metadata], None]

LETTERS = "õ÷ÁýÀÿøúþüùöû"
NEW_TYPES = {
    "tokenizer.chat_template": STRING,
    "llama.rope.scale_linear": F32,
    "tokenizer.ggml.prefix_token_id": U32,
    "tokenizer.ggml.suffix_token_id": U32,
    "tokenizer.ggml.middle_token_id": U32,
}


def convert(folder: Path, *, template: str | None = None) -> Path:
    """A fresh conversion; with a chat template it is an instruct model, whose EOS is <|EOT|>."""
    source = folder / ("tiny-coder-instruct" if template else "tiny-coder")
    shutil.copytree(TINY_CODER, source)
    if template:
        settings = json.loads((source / "tokenizer_config.json").read_text())
        settings |= {"eos_token": "<|EOT|>", "chat_template": template}
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    checkpoint = open_checkpoint(source)
    out = folder / f"{source.name}.gguf"
    run_gguf_plan(checkpoint, plan_gguf(checkpoint, PRESETS["q8_0"]), out)
    return out


def foreign(path: Path) -> Metadata:
    """A file's metadata without the tokenizer.json that only dsq puts in."""
    metadata = dict(read_gguf(path).metadata)
    del metadata["tokenizer.huggingface.json"]
    return metadata


def write(source: Path, metadata: Metadata, out: Path) -> Path:
    """The tensors of `source` with other metadata."""
    gguf = read_gguf(source)
    types = {key: (kind, None) for key, kind in NEW_TYPES.items()} | gguf.metadata_types
    entries = [KeyValue(key, value, *types[key]) for key, value in metadata.items()]
    rewrite_gguf(gguf, entries, out)
    return out


def drop(*keys: str) -> Fault:
    def fault(metadata: Metadata) -> None:
        for key in keys:
            metadata.pop(key, None)

    return fault


def put(**values: Any) -> Fault:
    """`tokenizer.ggml.` keys by their last part."""
    return lambda metadata: metadata.update(
        (f"tokenizer.ggml.{key}", value) for key, value in values.items()
    )


def types(kind: int, *texts: str) -> Fault:
    """Tokens of these texts (or beginnings of texts) typed `kind`."""

    def fault(metadata: Metadata) -> None:
        array = np.array(metadata["tokenizer.ggml.token_type"])
        for row, token in enumerate(metadata["tokenizer.ggml.tokens"]):
            if token.startswith(texts):
                array[row] = kind
        metadata["tokenizer.ggml.token_type"] = array

    return fault


def old_fim_names(metadata: Metadata) -> None:
    """The names before they were changed, with hole and end exchanged."""
    new = [metadata.pop(f"tokenizer.ggml.fim_{part}_token_id") for part in ("pre", "suf", "mid")]
    for name, row in zip(("prefix", "suffix", "middle"), (new[0], new[2], new[1]), strict=True):
        metadata[f"tokenizer.ggml.{name}_token_id"] = row


def old_fim_names_beside(metadata: Metadata) -> None:
    """Right under the new names; llama.cpp reads the old ones last, and they are exchanged."""
    for name, row in (("suffix", 4113), ("middle", 4111)):
        metadata[f"tokenizer.ggml.{name}_token_id"] = row


def old_rope_key(factor: float) -> Fault:
    def fault(metadata: Metadata) -> None:
        drop("llama.rope.scaling.type", "llama.rope.scaling.factor")(metadata)
        metadata["llama.rope.scale_linear"] = factor

    return fault


MARKERS = ("<｜fim", "<|EOT|>", "<|User|>", "<|Assistant|>", "<pad>")

# name: (the finding's code, the fault). Of one line only one can be in a file.
FAULTS: list[dict[str, tuple[str, Fault]]] = [
    {
        "no pre": ("pre", drop("tokenizer.ggml.pre")),
        "pre gpt-2": ("pre", put(pre="gpt-2")),
        "pre default": ("pre", put(pre="default")),
        "pre llama-bpe": ("pre", put(pre="llama-bpe")),
        "pre deepseek-llm": ("pre", put(pre="deepseek-llm")),
        "pre unheard of": ("pre", put(pre="deepseek-coder-v9")),
    },
    {
        "no rope factor": (
            "rope_scaling",
            drop("llama.rope.scaling.type", "llama.rope.scaling.factor"),
        ),
        "rope factor 1": (
            "rope_scaling",
            lambda metadata: metadata.update({"llama.rope.scaling.factor": 1.0}),
        ),
        "rope type none": (
            "rope_scaling",
            lambda metadata: metadata.update({"llama.rope.scaling.type": "none"}),
        ),
        "old rope key": ("rope_old_key", old_rope_key(4.0)),
        "old rope key of one": ("rope_scaling", old_rope_key(1.0)),
        "old rope key of two": ("rope_scaling", old_rope_key(2.0)),
        "old rope key beside": (
            "rope_old_key",
            lambda metadata: metadata.update({"llama.rope.scale_linear": 4.0}),
        ),
    },
    {
        "no rope base": ("rope_base", drop("llama.rope.freq_base")),
        "rope base 10000": (
            "rope_base",
            lambda metadata: metadata.update({"llama.rope.freq_base": 10000.0}),
        ),
    },
    {
        "no fim ids": (
            "fim",
            drop(*(f"tokenizer.ggml.fim_{part}_token_id" for part in ("pre", "suf", "mid"))),
        ),
        "fim swapped": ("fim", put(fim_suf_token_id=4113, fim_mid_token_id=4111)),
        "fim beyond the rows": ("fim", put(fim_mid_token_id=99999)),
        "fim swapped, old names": ("fim", old_fim_names),
        "fim swapped, old names beside": ("fim", old_fim_names_beside),
    },
    {
        "markers user-defined": ("control_types", types(4, *MARKERS)),
        "markers normal": ("control_types", types(1, *MARKERS)),
        "no types": ("token_types", drop("tokenizer.ggml.token_type")),
        "letters normal": ("letter_types", types(1, *LETTERS)),
        "rows user-defined": ("padding_types", types(4, "[PAD")),
        "rows normal": ("padding_types", types(1, "[PAD")),
    },
    {
        "no padding id": ("padding", drop("tokenizer.ggml.padding_token_id")),
        "padding beyond the rows": ("padding", put(padding_token_id=70000)),
    },
    {
        "no add_bos": ("add_bos", drop("tokenizer.ggml.add_bos_token")),
        "add_bos false": ("add_bos", put(add_bos_token=False)),
    },
    {
        "no bos": ("bos", drop("tokenizer.ggml.bos_token_id")),
        "bos of another": ("bos", put(bos_token_id=1)),
    },
    {
        "no eos": ("eos", drop("tokenizer.ggml.eos_token_id")),
        "eos beyond the rows": ("eos", put(eos_token_id=32014)),
        "eos a word": ("eos", put(eos_token_id=2)),
    },
    {
        "no eot": ("eot", drop("tokenizer.ggml.eot_token_id")),
        "eot beyond the rows": ("eot", put(eot_token_id=32021)),
    },
]

EVERY_FAULT = {name: fault for line in FAULTS for name, fault in line.items()}
