"""What llama.cpp allocates beside the weights: the KV cache and the buffers of one graph.

Read off the graph of src/models/llama.cpp with flash attention and held against what llama.cpp
itself reports (tests/runtime/test_fit.py): exact for an f16 cache, never less for a quantized one.
"""

from __future__ import annotations

from dsq.convert.spec import ModelSpec
from dsq.errors import InputError
from dsq.quant.scheme import GgmlType, ggml_type

N_UBATCH = 512  # llama.cpp's default: tokens that one compute graph holds
KV_TYPES = ("f16", "q8_0", "q4_0")  # from no loss to some

_PAD = 256  # llama.cpp rounds a context up to it


def padded_ctx(n_ctx: int) -> int:
    return -(-n_ctx // _PAD) * _PAD


def kv_type_for(spec: ModelSpec, name: str) -> GgmlType:
    """The cache's type. Raises InputError when a head does not divide into its blocks."""
    of = ggml_type(name)
    if spec.head_dim % of.block_size:
        raise InputError(
            f"KV type {name}: heads of {spec.head_dim} values do not divide into its blocks of "
            f"{of.block_size}; use f16"
        )
    return of


def kv_bytes_per_layer(spec: ModelSpec, n_ctx: int, kv_type: str = "f16") -> int:
    """K and V of one layer, exactly: 2 × cells × the row of all KV heads."""
    of = kv_type_for(spec, kv_type)
    return 2 * padded_ctx(n_ctx) * of.row_bytes(spec.n_head_kv * spec.head_dim)


def kv_bytes(spec: ModelSpec, n_ctx: int, kv_type: str = "f16") -> int:
    return spec.n_layer * kv_bytes_per_layer(spec, n_ctx, kv_type)


def compute_bytes(
    spec: ModelSpec, n_ctx: int, kv_type: str = "f16", *, n_ubatch: int = N_UBATCH, n_seq: int = 1
) -> int:
    """The graph's buffers for one micro-batch, and the logits that are handed out.

    The widest place is the head (logits, the normed and the plain hidden state) or the feed-forward
    block (gate, up and their product, four hidden states) beside the mask, which is f16 and as long
    as the context. A quantized cache is rotated, for which one more hidden state is kept.
    """
    tokens = min(n_ubatch, n_ctx)  # the batch is cut before the context is rounded up
    more = spec.n_embd if ggml_type(kv_type).is_quantized else 0
    head = 4 * (spec.n_vocab + 2 * spec.n_embd + more)
    block = 4 * (3 * spec.n_ff + 4 * spec.n_embd) + 2 * padded_ctx(n_ctx)
    rotation = 2 * 4 * 128 * 128 if more else 0  # two Hadamard matrices
    inputs = 32 * tokens + rotation  # positions, ids, indices of cells
    return tokens * max(head, block) + inputs + 4 * n_seq * spec.n_vocab
