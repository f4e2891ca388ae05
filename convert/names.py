"""Tensor names: Hugging Face's, GGUF's, and which tensors a model must have."""

from __future__ import annotations

import re

from dsq.convert.spec import ModelSpec
from dsq.errors import InputError

# llama3's RoPE scaling in a GGUF: a tensor that no checkpoint has.
ROPE_FREQS = "rope_freqs.weight"

# Buffers that old transformers saved although the config determines them.
IGNORED = re.compile(r".*rotary_emb\.(inv_freq|cos_cached|sin_cached)")

_GLOBAL: dict[str, str] = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER: dict[str, str] = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TO_HF_GLOBAL = {theirs: ours for ours, theirs in _GLOBAL.items()}
_TO_HF_IN_LAYER = {theirs: ours for ours, theirs in _IN_LAYER.items()}
_HF_LAYER = re.compile(r"model\.layers\.(0|[1-9]\d*)\.(.+)\.(weight|bias)")
_GGUF_LAYER = re.compile(r"blk\.(0|[1-9]\d*)\.(.+)\.(weight|bias)")


def is_ignored(hf_name: str) -> bool:
    """Whether a checkpoint's tensor is left out: the model does not need it."""
    return IGNORED.fullmatch(hf_name) is not None


def gguf_name(hf_name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` → `blk.3.ffn_up.weight`."""
    if hf_name in _GLOBAL:
        return _GLOBAL[hf_name]
    match = _HF_LAYER.fullmatch(hf_name)
    if match is None or match[2] not in _IN_LAYER:
        raise InputError(f"tensor {hf_name!r} is no tensor of a Llama in Hugging Face's naming")
    return f"blk.{match[1]}.{_IN_LAYER[match[2]]}.{match[3]}"


def hf_name(gguf_name: str) -> str:
    """`blk.3.ffn_up.weight` → `model.layers.3.mlp.up_proj.weight`."""
    if gguf_name in _TO_HF_GLOBAL:
        return _TO_HF_GLOBAL[gguf_name]
    match = _GGUF_LAYER.fullmatch(gguf_name)
    if match is None or match[2] not in _TO_HF_IN_LAYER:
        raise InputError(f"tensor {gguf_name!r} is no tensor of a Llama in GGUF's naming")
    return f"model.layers.{match[1]}.{_TO_HF_IN_LAYER[match[2]]}.{match[3]}"


def permuted_heads(gguf_name: str, spec: ModelSpec) -> int | None:
    """How many heads' rows GGUF stores permuted in this tensor; None when it does not.

    llama.cpp rotates neighbouring pairs, transformers a head's two halves, so the query and key
    rows (and their biases) change places: `LlamaModel.permute` in convert_hf_to_gguf.py.
    """
    match = _GGUF_LAYER.fullmatch(gguf_name)
    if match is None:
        return None
    return {"attn_q": spec.n_head, "attn_k": spec.n_head_kv}.get(match[2])


def expected_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by its Hugging Face name, with its row-major shape."""
    n_q, n_kv = spec.n_head * spec.head_dim, spec.n_head_kv * spec.head_dim
    linears: dict[str, tuple[int, int, bool]] = {  # rows, columns, has a bias
        "self_attn.q_proj": (n_q, spec.n_embd, spec.attention_bias),
        "self_attn.k_proj": (n_kv, spec.n_embd, spec.attention_bias),
        "self_attn.v_proj": (n_kv, spec.n_embd, spec.attention_bias),
        "self_attn.o_proj": (spec.n_embd, n_q, spec.attention_bias),
        "mlp.gate_proj": (spec.n_ff, spec.n_embd, spec.mlp_bias),
        "mlp.up_proj": (spec.n_ff, spec.n_embd, spec.mlp_bias),
        "mlp.down_proj": (spec.n_embd, spec.n_ff, spec.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.n_vocab, spec.n_embd)}
    for i in range(spec.n_layer):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (spec.n_embd,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (spec.n_embd,)
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{layer}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{layer}.{name}.bias"] = (rows,)
    shapes["model.norm.weight"] = (spec.n_embd,)
    if not spec.tied:
        shapes["lm_head.weight"] = (spec.n_vocab, spec.n_embd)
    return shapes
