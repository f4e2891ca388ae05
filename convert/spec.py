"""ModelSpec: what a checkpoint computes, whatever file it lies in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsq.convert.gptq.config import named
from dsq.convert.json_file import brief
from dsq.convert.rope import Rope, rope_from_config
from dsq.errors import InputError, UnsupportedError

ARCHITECTURE = "LlamaForCausalLM"


@dataclass(frozen=True)
class ModelSpec:
    """A Llama: sizes in the field's own names. `n_vocab` counts rows, not tokens."""

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    n_ctx: int
    rms_eps: float
    rope: Rope
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "bfloat16"
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self) -> None:
        sizes = ("n_layer", "n_embd", "n_ff", "n_head", "n_head_kv", "head_dim", "n_vocab", "n_ctx")
        for key in sizes:
            if getattr(self, key) <= 0:
                raise InputError(f"{key} is {getattr(self, key)}; it must be positive")
        if self.n_head % self.n_head_kv:
            raise InputError(
                f"{self.n_head} attention heads do not divide by {self.n_head_kv} KV heads"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim is {self.head_dim}; RoPE needs an even number")
        if not (math.isfinite(self.rms_eps) and self.rms_eps >= 0):
            raise InputError(f"rms_norm_eps is {self.rms_eps}; it must be a small positive number")

    @property
    def n_gqa(self) -> int:
        return self.n_head // self.n_head_kv

    def kv_bytes_per_token(self, bytes_per_value: float = 2.0) -> float:
        """KV cache of one token over all layers; f16 unless told."""
        return 2 * self.n_layer * self.n_head_kv * self.head_dim * bytes_per_value


def spec_from_config(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
) -> ModelSpec:
    """Read a Hugging Face config.json. Raises UnsupportedError naming what dsq cannot do."""
    architectures = config.get("architectures") or [ARCHITECTURE]
    if architectures != [ARCHITECTURE]:
        raise UnsupportedError(
            f"config.json: architectures {architectures!r} is not supported "
            f"(supported: {ARCHITECTURE})"
        )
    if config.get("model_type", "llama") != "llama":
        raise UnsupportedError(
            f"config.json: model_type {config['model_type']!r} is not supported (supported: llama)"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedError(
            f"config.json: hidden_act {config['hidden_act']!r} is not supported (supported: silu)"
        )
    if quantization := config.get("quantization_config"):
        raise UnsupportedError(
            f"config.json: the weights are quantized already ({_method(quantization)}), and dsq "
            f"reads only gptq and exl2; give the model that they were made from, or a GPTQ or "
            f"EXL2 version of it"
        )
    n_head = _int(config, "num_attention_heads")
    n_embd = _int(config, "hidden_size")
    head_dim = _int(config, "head_dim", 0)
    if not head_dim:
        if n_head and n_embd % n_head:
            raise InputError(
                f"config.json: hidden_size {n_embd} does not divide by "
                f"num_attention_heads {n_head}; set head_dim"
            )
        head_dim = n_embd // max(n_head, 1)
    generation = generation_config or {}
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    return ModelSpec(
        n_layer=_int(config, "num_hidden_layers"),
        n_embd=n_embd,
        n_ff=_int(config, "intermediate_size"),
        n_head=n_head,
        n_head_kv=_int(config, "num_key_value_heads", n_head),
        head_dim=head_dim,
        n_vocab=_int(config, "vocab_size"),
        n_ctx=_int(config, "max_position_embeddings", 2048),
        rms_eps=_float(config, "rms_norm_eps", 1e-6),
        rope=rope_from_config(config),
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        dtype=str(config.get("torch_dtype") or config.get("dtype") or "bfloat16"),
        bos_id=_id(generation.get("bos_token_id", config.get("bos_token_id"))),
        eos_ids=tuple(
            id
            for item in (eos if isinstance(eos, list) else [eos])
            if (id := _id(item)) is not None
        ),
        pad_id=_id(generation.get("pad_token_id", config.get("pad_token_id"))),
    )


def _int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        if default is None:
            raise InputError(f"config.json: {key} is missing")
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"config.json: {key} is {value!r}; expected an integer")
    return value


def _float(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"config.json: {key} is {value!r}; expected a number")
    if not abs(value) < 1e300:  # JSON can spell infinity as 1e999, and integers of 4000 digits
        raise InputError(f"config.json: {key} is too large a number")
    return float(value)


def _id(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _method(quantization: Any) -> str:
    """The name of what quantized a checkpoint; bitsandbytes' older files have none."""
    if not isinstance(quantization, Mapping):
        return f"quantization_config is {brief(quantization)}"
    if method := named(quantization).get("quant_method"):
        return f"by {brief(method)}"
    if any(str(key).startswith(("load_in_", "_load_in_", "bnb_")) for key in quantization):
        return "by bitsandbytes"
    return "quantization_config names no quant_method"
