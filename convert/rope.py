"""Rotary position embedding: one description, and every spelling of it.

Losing the factor is the classic damage to DeepSeek Coder (linear, 4): every reader here either
understands a spelling or refuses it by name. Sources: transformers' `modeling_rope_utils.py`,
llama.cpp's `conversion/llama.py` and `llama-model.cpp`, YaRN (arXiv 2309.00071).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dsq.errors import InputError, UnsupportedError

Kind = Literal["none", "linear", "llama3", "yarn"]
_KINDS: dict[str, Kind] = {
    "none": "none",
    "default": "none",
    "linear": "linear",
    "llama3": "llama3",
    "yarn": "yarn",
}


@dataclass(frozen=True)
class Rope:
    """RoPE base and scaling; positions are divided by `factor` when `kind` is linear."""

    freq_base: float = 10000.0
    kind: Kind = "none"
    factor: float = 1.0
    n_ctx_orig: int | None = None
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float | None = None  # yarn; None = 0.1 ln(factor) + 1
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn

    def __post_init__(self) -> None:
        if not (math.isfinite(self.freq_base) and self.freq_base > 0):
            raise InputError(f"rope_theta is {self.freq_base}; it must be a positive number")
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise InputError(f"RoPE factor is {self.factor}; it must be a positive number")
        if self.kind in ("llama3", "yarn") and (self.n_ctx_orig or 0) <= 0:
            raise InputError(
                f"RoPE kind {self.kind!r} needs original_max_position_embeddings in the config"
            )
        if self.kind == "yarn" and not (
            self.freq_base > 1 and min(self.beta_fast, self.beta_slow) > 0
        ):
            raise InputError(
                f"yarn needs rope_theta above 1 and positive beta_fast and beta_slow; they are "
                f"{self.freq_base}, {self.beta_fast} and {self.beta_slow}"
            )
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise InputError(
                f"RoPE low_freq_factor is {self.low_freq_factor} and high_freq_factor "
                f"{self.high_freq_factor}; the high one must be larger, and both positive"
            )

    def inv_freq(self, head_dim: int) -> tuple[npt.NDArray[np.float64], float]:
        """Angular step per position for each of head_dim/2 pairs, and the cos/sin multiplier."""
        base = self.freq_base ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.kind == "linear":
            return base / self.factor, 1.0
        if self.kind == "llama3":
            return base / self.freq_factors(head_dim), 1.0
        if self.kind == "yarn":
            return self._yarn(base, head_dim)
        return base, 1.0

    def freq_factors(self, head_dim: int) -> npt.NDArray[np.float64]:
        """llama3's divisor of each pair's frequency: GGUF's tensor `rope_freqs.weight`."""
        freqs = self.freq_base ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.kind != "llama3" or self.n_ctx_orig is None:
            return np.ones_like(freqs)
        wavelen = 2 * math.pi / freqs
        ratio = self.n_ctx_orig / wavelen
        smooth = (ratio - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        middle = 1 / ((1 - smooth) / self.factor + smooth)
        return np.where(
            ratio > self.high_freq_factor,
            1.0,
            np.where(ratio < self.low_freq_factor, self.factor, middle),
        )

    @property
    def yarn_mscale(self) -> float:
        """The YaRN paper's attention factor, which runtimes take when none is given."""
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def _yarn(
        self, base: npt.NDArray[np.float64], head_dim: int
    ) -> tuple[npt.NDArray[np.float64], float]:
        if self.n_ctx_orig is None:
            raise InputError("yarn needs the original context length")
        two_log = 2 * math.log(self.freq_base)

        def dim_of(rotations: float) -> float:
            assert self.n_ctx_orig is not None
            return head_dim * math.log(self.n_ctx_orig / (rotations * 2 * math.pi)) / two_log

        low = max(math.floor(dim_of(self.beta_fast)), 0)
        high = min(math.ceil(dim_of(self.beta_slow)), head_dim - 1)
        ramp = np.clip(
            (np.arange(head_dim // 2, dtype=np.float64) - low) / max(high - low, 0.001), 0, 1
        )
        scale = self.attention_factor
        if scale is None:
            scale = self.yarn_mscale
        return base / self.factor * ramp + base * (1 - ramp), scale

    def to_config(self) -> dict[str, Any]:
        """Keys for config.json that every reader understands.

        `rope_theta` at the top for all; `rope_scaling` with `type` only, since exllamav2 0.3.2
        asserts when `type` and `rope_type` are both there and ignores `rope_parameters`.
        """
        scaling: dict[str, Any] | None = None
        if self.kind == "linear":
            scaling = {"type": "linear", "factor": self.factor}
        elif self.kind == "llama3":
            scaling = {
                "rope_type": "llama3",
                "factor": self.factor,
                "low_freq_factor": self.low_freq_factor,
                "high_freq_factor": self.high_freq_factor,
                "original_max_position_embeddings": self.n_ctx_orig,
            }
        elif self.kind == "yarn":
            scaling = {
                "type": "yarn",
                "factor": self.factor,
                "original_max_position_embeddings": self.n_ctx_orig,
                "beta_fast": self.beta_fast,
                "beta_slow": self.beta_slow,
            }
            if self.attention_factor is not None:
                scaling["attention_factor"] = self.attention_factor
        theta = int(self.freq_base) if self.freq_base.is_integer() else self.freq_base
        return {"rope_theta": theta, "rope_scaling": scaling}


def rope_from_config(config: Mapping[str, Any]) -> Rope:
    """The RoPE of a Hugging Face config.json, in any of its spellings.

    Reads `rope_theta`, `rope_scaling` (`type`, `rope_type` or both) and transformers 5's
    `rope_parameters`. Raises UnsupportedError for a kind that is not known, and InputError when
    two spellings contradict each other: guessing would lose the factor.
    """
    found: list[tuple[str, Rope]] = []
    _refuse_partial("partial_rotary_factor", config)
    parameters = config.get("rope_parameters")
    theta = config.get("rope_theta")
    if theta is None and isinstance(parameters, Mapping):
        theta = parameters.get("rope_theta")
    for key in ("rope_scaling", "rope_parameters"):
        scaling = config.get(key)
        if scaling is None:
            continue
        if not isinstance(scaling, Mapping):
            raise InputError(f"config.json: {key} is {scaling!r}; expected an object")
        found.append((key, _one_spelling(key, scaling, config, theta)))
    if not found:
        return Rope(freq_base=_number("rope_theta", theta if theta is not None else 10000.0))
    if len(found) == 2 and found[0][1] != found[1][1]:
        raise InputError(
            f"config.json: rope_scaling says {describe(found[0][1])} but rope_parameters says "
            f"{describe(found[1][1])}; remove the wrong one"
        )
    return found[0][1]


def _one_spelling(
    key: str, scaling: Mapping[str, Any], config: Mapping[str, Any], theta: Any
) -> Rope:
    kinds = {str(scaling[k]) for k in ("type", "rope_type") if scaling.get(k) is not None}
    if len(kinds) > 1:
        raise InputError(f"config.json: {key} has type and rope_type that differ: {sorted(kinds)}")
    if not kinds:
        if "factor" in scaling:
            raise InputError(f'config.json: {key} has a factor but no type; add "type"')
        kinds = {"default"}
    name = kinds.pop().lower()
    kind = _KINDS.get(name)
    if kind is None:
        raise UnsupportedError(
            f"config.json: {key} type {name!r} is not supported "
            f"(supported: none, linear, llama3, yarn)"
        )
    _refuse_partial(f"{key}.partial_rotary_factor", scaling)
    for entry, value in scaling.items():
        # transformers 5 nests one description a layer type; what is in there would be lost
        if isinstance(value, Mapping):
            raise UnsupportedError(f"config.json: {key}.{entry} is an object: not supported")
    own = scaling.get("rope_theta")
    if own is not None and theta is not None and own != theta:
        raise InputError(f"config.json: rope_theta is {theta} but {key}.rope_theta is {own}")
    base = own if own is not None else theta if theta is not None else 10000.0
    if kind == "none":
        return Rope(freq_base=_number("rope_theta", base))
    if "factor" not in scaling:
        raise InputError(f"config.json: {key} of type {name!r} lacks its factor")
    orig = scaling.get("original_max_position_embeddings")
    if orig is None and kind == "yarn":
        orig = config.get("original_max_position_embeddings") or config.get(
            "max_position_embeddings"
        )
    if kind == "yarn":
        for entry in ("mscale", "mscale_all_dim", "extrapolation_factor"):
            if scaling.get(entry) is not None:
                raise UnsupportedError(f"config.json: {key}.{entry} is not supported")
        if not scaling.get("truncate", True):
            raise UnsupportedError(f"config.json: {key}.truncate false is not supported")
    attention = scaling.get("attention_factor", scaling.get("attn_factor"))
    return Rope(
        freq_base=_number("rope_theta", base),
        kind=kind,
        factor=_number(f"{key}.factor", scaling["factor"]),
        n_ctx_orig=None
        if orig is None or kind == "linear"
        else int(_number(f"{key}.original_max_position_embeddings", orig)),
        low_freq_factor=_number(f"{key}.low_freq_factor", scaling.get("low_freq_factor", 1.0)),
        high_freq_factor=_number(f"{key}.high_freq_factor", scaling.get("high_freq_factor", 4.0)),
        attention_factor=None
        if attention is None
        else _number(f"{key}.attention_factor", attention),
        beta_fast=_number(f"{key}.beta_fast", scaling.get("beta_fast") or 32.0),
        beta_slow=_number(f"{key}.beta_slow", scaling.get("beta_slow") or 1.0),
    )


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"config.json: {key} is {value!r}; expected a number")
    if not abs(value) < 1e300:  # JSON can spell infinity as 1e999, and integers of 4000 digits
        raise InputError(f"config.json: {key} is too large a number")
    return float(value)


def _refuse_partial(key: str, config: Mapping[str, Any]) -> None:
    if config.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UnsupportedError(f"config.json: {key} is not supported")


def rope_from_gguf(
    metadata: Mapping[str, Any],
    arch: str,
    *,
    freq_factors: npt.NDArray[np.float32] | None = None,
    head_dim: int = 0,
) -> Rope:
    """The RoPE of a GGUF's metadata; `freq_factors` is its rope_freqs.weight, if it has one."""
    prefix = f"{arch}.rope.scaling"
    base = _gguf_number(metadata, f"{arch}.rope.freq_base", 10000.0)
    # As llama.cpp: a factor without a type is linear (files from before 2023-11 carry
    # `scale_linear` alone), and 0 means no factor.
    old = _gguf_number(metadata, f"{arch}.rope.scale_linear", 0.0)
    factor = _gguf_number(metadata, f"{prefix}.factor", old) or 1.0
    name = metadata.get(f"{prefix}.type", "linear")
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None or kind == "llama3":
        raise UnsupportedError(
            f"{prefix}.type is {name!r}, which is not supported (supported: none, linear, yarn)"
        )
    if kind == "linear" and factor == 1.0:
        kind = "none"
    if freq_factors is not None and not np.all(freq_factors == 1):
        if kind != "none":
            raise UnsupportedError(f"rope_freqs.weight beside {prefix}.type {name!r}: unsupported")
        return _llama3_from_factors(base, freq_factors, head_dim)
    if kind == "none":
        return Rope(freq_base=base)
    if kind == "linear":
        return Rope(freq_base=base, kind=kind, factor=factor)
    # attn_factor, which llama.cpp multiplies by, comes on top of what YaRN infers. Its converter
    # writes the config's attention_factor as yarn_attn_factor, which the runtime overwrites.
    attention: float | None = None
    if f"{prefix}.attn_factor" in metadata:
        on_top = _gguf_number(metadata, f"{prefix}.attn_factor", 1.0)
        attention = on_top * Rope(base, factor=factor).yarn_mscale
    context = _gguf_number(metadata, f"{arch}.context_length", 0.0)
    return Rope(
        freq_base=base,
        kind=kind,
        factor=factor,
        n_ctx_orig=int(_gguf_number(metadata, f"{prefix}.original_context_length", context)),
        attention_factor=attention,  # the betas' keys are read by other architectures only
    )


def _gguf_number(metadata: Mapping[str, Any], key: str, default: float) -> float:
    value = metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{key} is {value!r}; expected a number")
    return float(value)


def _llama3_from_factors(base: float, factors: npt.NDArray[np.float32], head_dim: int) -> Rope:
    """The llama3 scaling whose frequency divisors are `factors`: GGUF keeps only those.

    Tries the settings that published models use; anything else cannot be named in a config.
    """
    factor = float(factors.max())
    for n_ctx_orig in (8192, 4096, 2048, 16384, 32768):
        for low, high in ((1.0, 4.0), (1.0, 1.0001), (1.0, 2.0), (1.0, 8.0)):
            rope = Rope(base, "llama3", factor, n_ctx_orig, low, high)
            wanted = rope.freq_factors(head_dim)
            if wanted.shape == factors.shape and np.allclose(wanted, factors, rtol=1e-4):
                return rope
    raise UnsupportedError(
        "rope_freqs.weight fits no known llama3 scaling; its config.json cannot be written"
    )


def describe(rope: Rope) -> str:
    """For messages: `linear, factor 4, base 100000`."""
    base = f"base {rope.freq_base:g}"
    return base if rope.kind == "none" else f"{rope.kind}, factor {rope.factor:g}, {base}"
