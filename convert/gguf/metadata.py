"""The key-value part of a GGUF, as data: what llama.cpp, Ollama and LM Studio read.

Sources: docs/gguf.md of ggml, llama.cpp's `conversion/base.py`, `conversion/llama.py` and
`src/llama-arch.cpp` for the spelling of each key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dsq.convert.spec import ModelSpec
from dsq.errors import UnsupportedError
from dsq.tokenizer_port.vocabulary import Vocabulary

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10  # GGUFValueType
U16, F64 = 2, 12

ARCH = "llama"
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION in ggml.h


@dataclass(frozen=True)
class KeyValue:
    """One entry; `element` is the element type when `type` is ARRAY."""

    key: str
    value: Any
    type: int
    element: int | None = None


def model_entries(spec: ModelSpec, *, name: str, n_params: int, file_type: int) -> list[KeyValue]:
    """`general.*` and `llama.*` of a model."""
    entries = [
        KeyValue("general.type", "model", STRING),
        KeyValue("general.name", name, STRING),
        KeyValue("general.size_label", size_label(n_params), STRING),
        KeyValue("general.file_type", file_type, U32),
        KeyValue("general.quantization_version", QUANTIZATION_VERSION, U32),
        KeyValue(f"{ARCH}.vocab_size", spec.n_vocab, U32),
        KeyValue(f"{ARCH}.context_length", spec.n_ctx, U32),
        KeyValue(f"{ARCH}.embedding_length", spec.n_embd, U32),
        KeyValue(f"{ARCH}.block_count", spec.n_layer, U32),
        KeyValue(f"{ARCH}.feed_forward_length", spec.n_ff, U32),
        KeyValue(f"{ARCH}.attention.head_count", spec.n_head, U32),
        KeyValue(f"{ARCH}.attention.head_count_kv", spec.n_head_kv, U32),
        KeyValue(f"{ARCH}.attention.layer_norm_rms_epsilon", spec.rms_eps, F32),
        KeyValue(f"{ARCH}.rope.dimension_count", spec.head_dim, U32),
    ]
    if spec.head_dim * spec.n_head != spec.n_embd:
        entries += [
            KeyValue(f"{ARCH}.attention.key_length", spec.head_dim, U32),
            KeyValue(f"{ARCH}.attention.value_length", spec.head_dim, U32),
        ]
    return entries + rope_entries(spec)


def rope_entries(spec: ModelSpec) -> list[KeyValue]:
    """The RoPE keys. llama3 scaling has none: it is the tensor `rope_freqs.weight`.

    Raises UnsupportedError for what llama.cpp would read past.
    """
    rope, prefix = spec.rope, f"{ARCH}.rope.scaling"
    entries = [KeyValue(f"{ARCH}.rope.freq_base", rope.freq_base, F32)]
    if rope.kind in ("linear", "yarn"):
        entries += [
            KeyValue(f"{prefix}.type", rope.kind, STRING),
            KeyValue(f"{prefix}.factor", rope.factor, F32),
        ]
    if rope.kind == "yarn":
        entries += [
            KeyValue(f"{prefix}.original_context_length", rope.n_ctx_orig, U32),
        ]
        if (rope.beta_fast, rope.beta_slow) != (32.0, 1.0):
            raise UnsupportedError(
                f"yarn with beta_fast {rope.beta_fast:g} and beta_slow {rope.beta_slow:g}: "
                f"llama.cpp knows only 32 and 1 for this architecture"
            )
        if rope.attention_factor is not None:
            # llama.cpp multiplies its own mscale by this (llama-context.cpp), and ignores the
            # yarn_attn_factor that its converter writes.
            times = rope.attention_factor / rope.yarn_mscale
            entries.append(KeyValue(f"{prefix}.attn_factor", times, F32))
    return entries


def vocabulary_entries(vocab: Vocabulary) -> list[KeyValue]:
    """`tokenizer.*`: everything a runtime needs, and the whole tokenizer.json besides."""
    entries = [
        KeyValue("tokenizer.ggml.model", vocab.model, STRING),
        KeyValue("tokenizer.ggml.pre", vocab.pre, STRING),
        KeyValue("tokenizer.ggml.tokens", list(vocab.tokens), ARRAY, STRING),
        KeyValue("tokenizer.ggml.token_type", [int(t) for t in vocab.types], ARRAY, I32),
        KeyValue("tokenizer.ggml.merges", list(vocab.merges), ARRAY, STRING),
    ]
    ids = {
        "bos_token_id": vocab.bos,
        "eos_token_id": vocab.eos,
        "eot_token_id": vocab.eot,
        "unknown_token_id": vocab.unk,
        "padding_token_id": vocab.pad,
        "fim_pre_token_id": vocab.fim_prefix,
        "fim_suf_token_id": vocab.fim_suffix,
        "fim_mid_token_id": vocab.fim_middle,
    }
    entries += [
        KeyValue(f"tokenizer.ggml.{key}", value, U32)
        for key, value in ids.items()
        if value is not None
    ]
    entries.append(KeyValue("tokenizer.ggml.add_bos_token", vocab.add_bos, BOOL))
    entries.append(KeyValue("tokenizer.ggml.add_eos_token", vocab.add_eos, BOOL))
    if vocab.add_space_prefix is not None:
        entries.append(KeyValue("tokenizer.ggml.add_space_prefix", vocab.add_space_prefix, BOOL))
    if vocab.chat_template:
        entries.append(KeyValue("tokenizer.chat_template", vocab.chat_template, STRING))
    if vocab.chat_templates:
        names = list(vocab.chat_templates)
        entries.append(KeyValue("tokenizer.chat_templates", names, ARRAY, STRING))
        entries += [
            KeyValue(f"tokenizer.chat_template.{n}", vocab.chat_templates[n], STRING) for n in names
        ]
    if vocab.tokenizer_json:
        entries.append(KeyValue("tokenizer.huggingface.json", vocab.tokenizer_json, STRING))
    return entries


def copied_entries(
    metadata: Mapping[str, Any],
    types: Mapping[str, tuple[int, int | None]],
    replaced: Iterable[KeyValue],
) -> list[KeyValue]:
    """A GGUF's own entries, in order, without the split keys and with `replaced` on top."""
    new = {entry.key: entry for entry in replaced}
    entries = []
    for key, value in metadata.items():
        if key.startswith("split.") or key in ("general.architecture", "general.alignment"):
            continue  # the writer's own
        if types[key][0] == ARRAY and len(value) == 0:
            continue  # means the same as no key, and gguf-py refuses to write it
        entries.append(new.pop(key) if key in new else KeyValue(key, value, *types[key]))
    return entries + list(new.values())


def size_label(n_params: int) -> str:
    """`1.3B`, `135M`: as gguf-py's `size_label` rounds."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if n_params >= scale:
            value = n_params / scale
            text = f"{value:.1f}" if value < 10 else f"{value:.0f}"
            return text.removesuffix(".0") + unit
    return f"{n_params / 1e3:.0f}K"
