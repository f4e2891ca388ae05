"""The source's graph written out in numpy: what any runtime of the model has to reproduce.

A plain Llama after transformers' `modeling_llama.py`: Hugging Face's tensor names, row order and
half-split rotation, float32 throughout. One layer at a time, so that a caller may hold one
layer's weights. Rotation angles are computed in float64: at position 5,000 a float32 product is
off by 3e-4 radians.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from dsq.convert.spec import ModelSpec

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Rotation = tuple[Floats, Floats]

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def rotation(spec: ModelSpec, positions: Ints) -> Rotation:
    """cos and sin (n, head_dim / 2) of each position's angles, with yarn's multiplier."""
    step, scale = spec.rope.inv_freq(spec.head_dim)
    angles = positions.astype(np.float64)[:, None] * step
    return (
        (np.cos(angles) * scale).astype(np.float32),
        (np.sin(angles) * scale).astype(np.float32),
    )


def causal(n: int) -> npt.NDArray[np.bool_]:
    """Which token sees which (n, n): every token itself and all before it."""
    return np.tri(n, dtype=bool)


def forward(spec: ModelSpec, weights: Mapping[str, Floats], ids: Ints) -> Floats:
    """Logits (n, n_vocab) of a whole model at positions 0 … n-1."""
    turned, sees = rotation(spec, np.arange(len(ids), dtype=np.int32)), causal(len(ids))
    hidden = weights[EMBEDDING][ids]
    for i in range(spec.n_layer):
        hidden = layer_forward(spec, i, weights, hidden, turned, sees)
    head = weights[EMBEDDING if spec.tied else HEAD]
    return head_forward(spec, weights[NORM], head, hidden)


def layer_forward(
    spec: ModelSpec,
    layer: int,
    weights: Mapping[str, Floats],
    hidden: Floats,
    turned: Rotation,
    sees: npt.NDArray[np.bool_],
) -> Floats:
    """One decoder layer: hidden (n, n_embd) to the same shape; `sees` is (n, n)."""
    inside = _Layer(f"model.layers.{layer}", weights)
    normed = _rms_norm(hidden, inside["input_layernorm"], spec.rms_eps)
    hidden = hidden + inside.linear(
        "self_attn.o_proj", _attention(spec, inside, normed, turned, sees)
    )
    normed = _rms_norm(hidden, inside["post_attention_layernorm"], spec.rms_eps)
    gate = inside.linear("mlp.gate_proj", normed)
    gate *= inside.linear("mlp.up_proj", normed) / (1 + np.exp(-gate))  # SwiGLU: silu(gate) * up
    return hidden + inside.linear("mlp.down_proj", gate)


def head_forward(spec: ModelSpec, norm: Floats, head: Floats, hidden: Floats) -> Floats:
    """Final norm and head: logits (n, n_vocab)."""
    logits: Floats = _rms_norm(hidden, norm, spec.rms_eps) @ head.T
    return logits


class _Layer:
    """The weights of one layer, by their names inside it."""

    def __init__(self, prefix: str, weights: Mapping[str, Floats]) -> None:
        self._prefix = prefix
        self._weights = weights

    def __getitem__(self, name: str) -> Floats:
        return self._weights[f"{self._prefix}.{name}.weight"]

    def linear(self, name: str, inputs: Floats) -> Floats:
        """(n, columns) to (n, rows), with the bias if there is one."""
        out: Floats = inputs @ self[name].T
        bias = self._weights.get(f"{self._prefix}.{name}.bias")
        return out if bias is None else out + bias


def _attention(
    spec: ModelSpec,
    inside: _Layer,
    normed: Floats,
    turned: Rotation,
    sees: npt.NDArray[np.bool_],
) -> Floats:
    n, dim = len(normed), spec.head_dim
    # (n, heads, dim) → (heads, n, dim)
    q = inside.linear("self_attn.q_proj", normed).reshape(n, spec.n_head, dim).swapaxes(0, 1)
    k = inside.linear("self_attn.k_proj", normed).reshape(n, spec.n_head_kv, dim).swapaxes(0, 1)
    v = inside.linear("self_attn.v_proj", normed).reshape(n, spec.n_head_kv, dim).swapaxes(0, 1)
    k, v = np.repeat(_rotate(k, turned), spec.n_gqa, axis=0), np.repeat(v, spec.n_gqa, axis=0)
    scores = _rotate(q, turned) @ k.swapaxes(1, 2) * np.float32(dim**-0.5)  # (n_head, n, n)
    scores[:, ~sees] = -np.inf
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    scores /= scores.sum(axis=-1, keepdims=True)
    mixed: Floats = scores @ v  # (n_head, n, dim)
    return mixed.swapaxes(0, 1).reshape(n, spec.n_head * dim)


def _rotate(heads: Floats, turned: Rotation) -> Floats:
    """Turn (heads, n, dim): pair j of a head is its values j and j + dim / 2."""
    cos, sin = turned
    first, second = np.split(heads, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _rms_norm(hidden: Floats, weight: Floats, eps: float) -> Floats:
    mean = np.mean(np.square(hidden), axis=-1, keepdims=True)
    normed: Floats = hidden / np.sqrt(mean + np.float32(eps)) * weight
    return normed
