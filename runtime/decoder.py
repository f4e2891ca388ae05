"""The model's graph in torch, one decoder layer at a time: for calibration and what builds on it.

After transformers' `modeling_llama.py`, with Hugging Face's tensor names, row order and half-split
rotation. A layer is four stages, each a matrix product (or three, or two) of one input: that input
is what an importance matrix and a Hessian describe.

    hidden ─ norm ─ ATTN_IN ─ q, k, v ─ attention ─ ATTN_OUT ─ o ─ + hidden
           ─ norm ─ FFN_IN ─ gate, up ─ silu(gate) · up ─ FFN_OUT ─ down ─ + hidden
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
from dsq.convert.names import expected_tensors, gguf_name, permuted_heads
from dsq.convert.spec import ModelSpec
from dsq.convert.tensor_plan import half_split_rows
from dsq.errors import InputError
from dsq.quant import ggml

if TYPE_CHECKING:
    from torch import Tensor

ATTN_IN, ATTN_OUT, FFN_IN, FFN_OUT = "attn_in", "attn_out", "ffn_in", "ffn_out"

# The linears that read each stage's input, by their names inside a layer.
STAGES: dict[str, tuple[str, ...]] = {
    ATTN_IN: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ATTN_OUT: ("self_attn.o_proj",),
    FFN_IN: ("mlp.gate_proj", "mlp.up_proj"),
    FFN_OUT: ("mlp.down_proj",),
}

Weights = Mapping[str, "Tensor"]  # by the name inside a layer: "mlp.up_proj.weight"


def chosen_device(name: str) -> str:
    """The device of `--device auto`, `cpu` or `cuda`. Raises InputError for a card that is none."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this torch sees no CUDA card; use --device cpu")
    return name


def read_tensor(
    checkpoint: HfCheckpoint | GgufCheckpoint, hf_name: str, device: str = "cpu"
) -> Tensor:
    """One tensor in float32, in Hugging Face's row order. Raises InputError when it is missing."""
    import torch

    is_gguf = checkpoint.format == "gguf"
    name = gguf_name(hf_name) if is_gguf else hf_name
    info = checkpoint.tensors[name]
    # torch's memory, not numpy's: it is aligned the same way in every run, and so are the results.
    tensor = torch.empty(info.shape)
    data = np.ascontiguousarray(checkpoint.data(name))
    ggml.dequantize_into(data, info.type, tensor.numpy())
    heads = permuted_heads(name, checkpoint.spec) if is_gguf else None
    if heads:
        tensor = tensor[torch.from_numpy(half_split_rows(len(tensor), heads))]
    return tensor.to(device)


def read_layer(
    checkpoint: HfCheckpoint | GgufCheckpoint, layer: int, device: str = "cpu"
) -> dict[str, Tensor]:
    """The weights of one layer, by their names inside it."""
    prefix = f"model.layers.{layer}."
    return {
        name.removeprefix(prefix): read_tensor(checkpoint, name, device)
        for name in expected_tensors(checkpoint.spec)
        if name.startswith(prefix)
    }


class Decoder:
    """The graph of one model for windows of `n_ctx` tokens; it holds no weights.

    `hidden` is (windows, n_ctx, n_embd) everywhere; every function can be differentiated. A
    subclass that overrides `linear` sees what each matrix reads and gives.
    """

    def __init__(self, spec: ModelSpec, n_ctx: int, device: str = "cpu") -> None:
        import torch

        self.spec, self.n_ctx, self.device = spec, n_ctx, device
        step, scale = spec.rope.inv_freq(spec.head_dim)
        angles = np.arange(n_ctx, dtype=np.float64)[:, None] * step  # float64: see `reference`
        self._cos = torch.from_numpy((np.cos(angles) * scale).astype(np.float32)).to(device)
        self._sin = torch.from_numpy((np.sin(angles) * scale).astype(np.float32)).to(device)

    def layer(self, weights: Weights, hidden: Tensor) -> Tensor:
        """One decoder layer."""
        hidden = self.add_attention(weights, hidden, self.mixed(weights, hidden))
        return self.add_ffn(weights, hidden, self.gated(weights, hidden))

    def linear(self, weights: Weights, name: str, inputs: Tensor) -> Tensor:
        """One of `STAGES`' matrices: (…, n_in) to (…, n_out)."""
        return linear(weights, name, inputs)

    # The stages; each takes what the one before it gave.

    def attn_in(self, weights: Weights, hidden: Tensor) -> Tensor:
        """ATTN_IN, what q, k and v read: the normalized hidden state."""
        return rms_norm(hidden, weights["input_layernorm.weight"], self.spec.rms_eps)

    def mixed(self, weights: Weights, hidden: Tensor) -> Tensor:
        """ATTN_OUT, what o reads: the attention's values (windows, n_ctx, n_head · head_dim)."""
        from torch.nn.functional import scaled_dot_product_attention

        spec = self.spec
        normed = self.attn_in(weights, hidden)
        q = self._heads(self.linear(weights, "self_attn.q_proj", normed), spec.n_head)
        k = self._heads(self.linear(weights, "self_attn.k_proj", normed), spec.n_head_kv)
        v = self._heads(self.linear(weights, "self_attn.v_proj", normed), spec.n_head_kv)
        mixed = scaled_dot_product_attention(
            self._rotate(q), self._rotate(k), v, is_causal=True, enable_gqa=spec.n_gqa > 1
        )
        return mixed.transpose(1, 2).flatten(2)  # (windows, n_ctx, n_head · head_dim)

    def add_attention(self, weights: Weights, hidden: Tensor, mixed: Tensor) -> Tensor:
        """The hidden state between attention and feed-forward."""
        return hidden + self.linear(weights, "self_attn.o_proj", mixed)

    def ffn_in(self, weights: Weights, hidden: Tensor) -> Tensor:
        """FFN_IN, what gate and up read; `hidden` is `add_attention`'s."""
        return rms_norm(hidden, weights["post_attention_layernorm.weight"], self.spec.rms_eps)

    def gated(self, weights: Weights, hidden: Tensor) -> Tensor:
        """FFN_OUT, what down reads: (windows, n_ctx, n_ff)."""
        from torch.nn.functional import silu

        normed = self.ffn_in(weights, hidden)
        gate = silu(self.linear(weights, "mlp.gate_proj", normed))
        return gate * self.linear(weights, "mlp.up_proj", normed)

    def add_ffn(self, weights: Weights, hidden: Tensor, gated: Tensor) -> Tensor:
        """The layer's output."""
        return hidden + self.linear(weights, "mlp.down_proj", gated)

    def output_in(self, norm: Tensor, hidden: Tensor) -> Tensor:
        """What the head reads: the last layer's output, normalized."""
        return rms_norm(hidden, norm, self.spec.rms_eps)

    def logits(self, norm: Tensor, head: Tensor, hidden: Tensor) -> Tensor:
        """Final norm and head: (windows, n_ctx, n_vocab)."""
        return self.output_in(norm, hidden) @ head.T

    def _heads(self, values: Tensor, n_head: int) -> Tensor:
        # (windows, n_ctx, heads · dim) → (windows, heads, n_ctx, dim)
        return values.reshape(*values.shape[:-1], n_head, self.spec.head_dim).transpose(1, 2)

    def _rotate(self, heads: Tensor) -> Tensor:
        """Turn pair j of a head, its values j and j + dim / 2, by its position's angle."""
        import torch

        n = heads.shape[-2]
        cos, sin = self._cos[:n], self._sin[:n]
        first, second = heads.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def linear(weights: Weights, name: str, inputs: Tensor) -> Tensor:
    """(…, n_in) to (…, n_out), with the bias if there is one."""
    from torch.nn.functional import linear as product

    bias: Any = weights.get(f"{name}.bias")
    return product(inputs, weights[f"{name}.weight"], bias)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    import torch

    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps) * weight
