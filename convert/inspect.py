"""What is in a checkpoint, and the memory it needs. Headers only: no weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint, open_checkpoint
from dsq.convert.gguf.reader import GgufFile, read_gguf
from dsq.convert.memory import compute_bytes, kv_bytes
from dsq.convert.names import ROPE_FREQS
from dsq.convert.spec import ModelSpec
from dsq.errors import InputError
from dsq.tokenizer_port.vocabulary import TokenType, Vocabulary


@dataclass(frozen=True)
class Memory:
    """Bytes that a runtime needs at `n_ctx` with an f16 KV cache.

    `compute` is an estimate of llama.cpp's graph buffers with flash attention: the logits and
    the widest activations of one micro-batch, in float32.
    """

    n_ctx: int
    weights: int
    kv_cache: int
    compute: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.compute

    def to_json(self) -> dict[str, int]:
        return {
            "n_ctx": self.n_ctx,
            "weights_bytes": self.weights,
            "kv_cache_bytes": self.kv_cache,
            "compute_bytes": self.compute,
            "total_bytes": self.total,
        }


def memory_at(spec: ModelSpec, weights: int, n_ctx: int) -> Memory:
    """See `Memory`; with an f16 cache, as llama.cpp allocates it."""
    return Memory(
        n_ctx=n_ctx,
        weights=weights,
        kv_cache=kv_bytes(spec, n_ctx),
        compute=compute_bytes(spec, n_ctx),
    )


def inspect_checkpoint(
    checkpoint: HfCheckpoint | GgufCheckpoint, n_ctx: int | None = None
) -> dict[str, Any]:
    """The report of `dsq inspect`, with stable keys. Raises InputError for a damaged file."""
    spec = checkpoint.spec
    tensors = checkpoint.tensors.values()
    n_params = sum(t.n_elements for t in tensors if t.name != ROPE_FREQS)
    by_type: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        kind, size = tensor.type.name, tensor.n_bytes
        if isinstance(checkpoint, HfCheckpoint):
            kind, size = checkpoint.stored_as(tensor.name)
        entry = by_type.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += size
    n_bytes = sum(entry["bytes"] for entry in by_type.values())
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "architecture": "llama",
        "n_params": n_params,
        "n_layer": spec.n_layer,
        "n_embd": spec.n_embd,
        "n_ff": spec.n_ff,
        "n_head": spec.n_head,
        "n_head_kv": spec.n_head_kv,
        "head_dim": spec.head_dim,
        "n_vocab": spec.n_vocab,
        "tied_embeddings": spec.tied,
        "rope": {
            "freq_base": spec.rope.freq_base,
            "kind": spec.rope.kind,
            "factor": spec.rope.factor,
        },
        "n_ctx": spec.n_ctx,
        "tokenizer": describe_tokenizer(_vocabulary(checkpoint)),
        "tensors_by_type": by_type,
        "size_bytes": n_bytes,
        "bpw": round(8 * n_bytes / n_params, 4),
        "memory_at_ctx": memory_at(spec, n_bytes, n_ctx or spec.n_ctx).to_json(),
    }


def open_model(path: Path) -> HfCheckpoint | GgufCheckpoint:
    """As `open_checkpoint`, but says of a vocabulary-only GGUF what it is."""
    try:
        return open_checkpoint(path)
    except InputError:
        if path.is_file() and path.suffix == ".gguf":
            check_has_weights(read_gguf(path))
        raise


def check_has_weights(gguf: GgufFile) -> None:
    """Refuse a GGUF that holds a vocabulary only, as llama.cpp's `ggml-vocab-*.gguf` do."""
    if not gguf.tensors:
        raise InputError(
            f"{gguf.path}: holds a vocabulary only (no tensors); it is for dsq tokenize and "
            f"dsq doctor, give a file with weights here"
        )


def _vocabulary(checkpoint: HfCheckpoint | GgufCheckpoint) -> Vocabulary:
    """A GGUF without `tokenizer.ggml.pre` is looked at all the same."""
    if isinstance(checkpoint, HfCheckpoint):
        return checkpoint.vocabulary()
    from dsq.tokenizer_port.load import vocabulary_from_gguf

    return vocabulary_from_gguf(checkpoint.gguf.metadata, allow_default=True)


def describe_tokenizer(vocab: Vocabulary) -> dict[str, Any]:
    """`n_tokens` counts tokens, not the unused rows behind them."""
    return {
        "kind": "bpe",
        "pre": vocab.pre,
        "n_tokens": sum(t != TokenType.UNUSED for t in vocab.types),
        "bos": vocab.bos,
        "eos": vocab.eos,
        "eot": vocab.eot,
        "fim": {
            "prefix": vocab.fim_prefix,
            "suffix": vocab.fim_suffix,
            "middle": vocab.fim_middle,
        },
        "add_bos": vocab.add_bos,
        "chat_template": bool(vocab.chat_template),
    }
