"""ModelSpec of a GGUF, from its metadata and tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dsq.convert.gguf.reader import GgufFile
from dsq.convert.names import ROPE_FREQS
from dsq.convert.rope import rope_from_gguf
from dsq.convert.spec import ModelSpec
from dsq.errors import InputError, UnsupportedError
from dsq.quant.scheme import F32

ARCH = "llama"

# Keys under which llama.cpp computes something else than a plain Llama; zero or false is harmless.
_UNSUPPORTED = {
    "expert_count": "a mixture of experts",
    "attention.sliding_window": "sliding-window attention",
    "attention.scale": "another attention scale",
    "embedding_scale": "scaled embeddings",
    "residual_scale": "scaled residuals",
    "logit_scale": "scaled logits",
}
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def spec_from_gguf(gguf: GgufFile) -> ModelSpec:
    """What the GGUF computes. Raises InputError or UnsupportedError, naming file and key."""
    try:
        return _spec(gguf)
    except InputError as error:
        raise type(error)(f"{gguf.path}: {error}") from error


def _spec(gguf: GgufFile) -> ModelSpec:
    meta, tensors = gguf.metadata, gguf.tensors
    arch = meta.get("general.architecture")
    if arch != ARCH:
        raise UnsupportedError(
            f"general.architecture is {arch!r}, which is not supported (supported: {ARCH})"
        )
    for key, what in _UNSUPPORTED.items():
        if np.any(meta.get(f"{ARCH}.{key}", 0)):
            raise UnsupportedError(f"{ARCH}.{key} asks for {what}, which is not supported")
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InputError("tensor 'token_embd.weight' is missing or no matrix")
    n_head, n_embd = _int(meta, "attention.head_count"), _int(meta, "embedding_length")
    head_dim = _head_dim(meta, n_embd, n_head)
    query = tensors.get("blk.0.attn_q.weight", embedding)
    eos = _token(meta, "eos")
    return ModelSpec(
        n_layer=_int(meta, "block_count"),
        n_embd=n_embd,
        n_ff=_int(meta, "feed_forward_length"),
        n_head=n_head,
        n_head_kv=_int(meta, "attention.head_count_kv", n_head),
        head_dim=head_dim,
        n_vocab=embedding.shape[0],
        n_ctx=_int(meta, "context_length"),
        rms_eps=_float(meta, "attention.layer_norm_rms_epsilon"),
        rope=rope_from_gguf(
            meta, ARCH, freq_factors=_freq_factors(gguf, head_dim), head_dim=head_dim
        ),
        tied="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        dtype=_DTYPES.get(query.type.name, "float16"),  # float16 is what runtimes dequantize to
        bos_id=_token(meta, "bos"),
        eos_ids=() if eos is None else (eos,),
        pad_id=_token(meta, "padding"),
    )


def _head_dim(meta: Mapping[str, Any], n_embd: int, n_head: int) -> int:
    n_rot = _int(meta, "rope.dimension_count", 0)
    if n_head <= 0 or (not n_rot and n_embd % n_head):
        raise InputError(
            f"{ARCH}.embedding_length {n_embd} does not divide by "
            f"{ARCH}.attention.head_count {n_head}"
        )
    head_dim = _int(meta, "attention.key_length", n_rot or n_embd // n_head)
    if n_rot not in (0, head_dim):  # llama.cpp: "invalid n_rot"
        raise UnsupportedError(
            f"{ARCH}.rope.dimension_count is {n_rot}, not the head's {head_dim}: partial rotation "
            f"is not supported"
        )
    n_value = _int(meta, "attention.value_length", head_dim)
    if n_value != head_dim:
        raise UnsupportedError(
            f"{ARCH}.attention.value_length is {n_value}, not key_length's {head_dim}: "
            f"not supported"
        )
    return head_dim


def _freq_factors(gguf: GgufFile, head_dim: int) -> Any:
    info = gguf.tensors.get(ROPE_FREQS)
    if info is None:
        return None
    if info.type is not F32 or info.shape != (head_dim // 2,):
        raise InputError(
            f"tensor {ROPE_FREQS!r} is {info.type} of shape {list(info.shape)}; expected f32 of "
            f"[{head_dim // 2}], half of the head"
        )
    return gguf.data(ROPE_FREQS).view("<f4").astype(np.float32)


def _value(meta: Mapping[str, Any], key: str) -> Any:
    value = meta.get(f"{ARCH}.{key}")
    if isinstance(value, (list, np.ndarray)):
        raise UnsupportedError(f"{ARCH}.{key} differs by layer, which is not supported")
    return value


def _int(meta: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = _value(meta, key)
    if value is None:
        if default is None:
            raise InputError(f"{ARCH}.{key} is missing; convert the model again")
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{ARCH}.{key} is {value!r}; expected an integer")
    return value


def _float(meta: Mapping[str, Any], key: str) -> float:
    value = _value(meta, key)
    if value is None:
        raise InputError(f"{ARCH}.{key} is missing; convert the model again")
    if not isinstance(value, float):
        raise InputError(f"{ARCH}.{key} is {value!r}; expected a float")
    return _shortest(value)


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-6 and not 9.999999974752427e-07."""
    return float(str(np.float32(value)))


def _token(meta: Mapping[str, Any], name: str) -> int | None:
    value = meta.get(f"tokenizer.ggml.{name}_token_id")
    return value if isinstance(value, int) and not isinstance(value, bool) else None
