"""Which tensor gets which type: llama-quantize's choice, as a pure function on names and shapes.

A port of `llama_tensor_get_type` and its helpers in llama.cpp's src/llama-quant.cpp, for the
`llama` architecture without experts. Tests hold it to `llama_model_quantize`'s own output.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dsq.errors import InputError
from dsq.quant.presets import Preset
from dsq.quant.scheme import BY_NAME, F16, GgmlType

Q2_K, Q3_K, Q4_K = BY_NAME["q2_k"], BY_NAME["q3_k"], BY_NAME["q4_k"]
Q5_K, Q6_K, Q8_0 = BY_NAME["q5_k"], BY_NAME["q6_k"], BY_NAME["q8_0"]
Q4_1, Q5_1 = BY_NAME["q4_1"], BY_NAME["q5_1"]
IQ2_XXS, IQ2_S = BY_NAME["iq2_xxs"], BY_NAME["iq2_s"]
IQ3_XXS, IQ3_S = BY_NAME["iq3_xxs"], BY_NAME["iq3_s"]

LOW_BIT = frozenset({"iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq1_s", "iq1_m"})

# A row that is no multiple of the block falls back (tensor_type_fallback).
FALLBACK: dict[str, str] = {
    **dict.fromkeys(
        ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"), "iq4_nl"
    ),
    **dict.fromkeys(("q2_0", "q2_k", "q3_k", "tq1_0", "tq2_0"), "q4_0"),
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}

NEEDS_IMATRIX = frozenset({"iq3_xxs", "iq2_xxs", "iq2_xs", "iq2_s", "iq1_m", "iq1_s"})


@dataclass(frozen=True)
class PlanTensor:
    """What the choice depends on: GGUF name, shape with rows of shape[-1], present type."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType


@dataclass(frozen=True)
class ModelShape:
    """The hyperparameters that the choice depends on."""

    n_layer: int
    n_head: int
    n_head_kv: int

    @property
    def n_gqa(self) -> int:
        return self.n_head // self.n_head_kv

    @property
    def is_70b(self) -> bool:
        # llama.cpp's LLM_TYPE_70B: 80 layers with grouped-query attention.
        return self.n_layer == 80 and self.n_head != self.n_head_kv


@dataclass(frozen=True)
class Options:
    """The flags of llama-quantize that change the choice of types."""

    only_copy: bool = False
    pure: bool = False
    leave_output_tensor: bool = False
    output_tensor_type: GgmlType | None = None
    token_embedding_type: GgmlType | None = None
    tensor_types: Sequence[tuple[re.Pattern[str], GgmlType]] = ()


def tensor_order(name: str) -> tuple[int, bytes]:
    """llama.cpp's order of tensors (`weight_name_comparer`): by layer, then by name."""
    match = re.match(r"blk\.(\d+)\.", name)
    return (int(match.group(1)) if match else -1, name.encode())


def category(name: str) -> str:
    """llama.cpp's `tensor_get_category`, for the tensors that the llama architecture has."""
    if name == "output.weight":
        return "output"
    if name == "token_embd.weight":
        return "token_embd"
    for key in ("attn_v", "attn_k", "attn_q", "attn_output"):
        if f"{key}.weight" in name:
            return key
    for key in ("ffn_up", "ffn_gate", "ffn_down"):
        if key in name:
            return key
    return "other"


def is_quantizable(tensor: PlanTensor, options: Options) -> bool:
    """`tensor_allows_quantization`: matrices called *weight that are no norms."""
    return (
        not options.only_copy
        and len(tensor.shape) >= 2
        and tensor.name.endswith("weight")
        and "_norm.weight" not in tensor.name
        and not (options.leave_output_tensor and tensor.name == "output.weight")
    )


def use_more_bits(i_layer: int, n_layer: int) -> bool:
    """The first and last eighth of the layers, and every third one between."""
    eighth = n_layer // 8
    return i_layer < eighth or i_layer >= 7 * n_layer // 8 or (i_layer - eighth) % 3 == 2


def choose_types(
    tensors: Iterable[PlanTensor],
    preset: Preset,
    shape: ModelShape,
    options: Options | None = None,
    *,
    has_imatrix: bool = False,
) -> dict[str, GgmlType]:
    """The type of every tensor, by name.

    `has_imatrix` changes the choice (q4_0 puts the first eighth of ffn_down at q4_1 then).
    Raises InputError when the preset is unusable for a tensor's shape.
    """
    opts = options or Options()
    ordered = sorted(tensors, key=lambda t: tensor_order(t.name))
    mix = _Mix(
        preset=preset.name,
        shape=shape,
        options=opts,
        has_imatrix=has_imatrix,
        tied=not any(t.name == "output.weight" for t in ordered),
        n_attn_v=sum(category(t.name) == "attn_v" for t in ordered),
    )
    return {t.name: _choose(t, preset.base, mix, opts) for t in ordered}


def _choose(tensor: PlanTensor, base: GgmlType, mix: _Mix, options: Options) -> GgmlType:
    if not is_quantizable(tensor, options):
        return tensor.type
    kind = category(tensor.name)
    if kind == "token_embd" and options.token_embedding_type:
        return options.token_embedding_type
    if kind == "output" and options.output_tensor_type:
        return options.output_tensor_type
    if not base.is_quantized:
        return base
    chosen = base
    for pattern, named in options.tensor_types:
        if pattern.search(tensor.name):
            chosen = named
            break
    else:
        if not options.pure:
            chosen = mix.choose(kind, base, tensor.shape[-1])
    return fallback(tensor.name, tensor.shape[-1], chosen)


def fallback(name: str, n_per_row: int, chosen: GgmlType) -> GgmlType:
    """The type that can hold rows of `n_per_row` values when `chosen` cannot."""
    if n_per_row % chosen.block_size == 0:
        return chosen
    smaller = FALLBACK.get(chosen.name)
    if smaller is None:
        if chosen.block_size > 32:
            raise InputError(
                f"{name}: rows of {n_per_row} do not divide into {chosen.name} blocks of "
                f"{chosen.block_size}, and llama.cpp defines no fallback; name another type"
            )
        return F16
    found = BY_NAME[smaller]
    return found if n_per_row % found.block_size == 0 else F16


class _Mix:
    """`llama_tensor_get_type_impl`: counts the layers of each kind as it goes."""

    def __init__(
        self,
        *,
        preset: str,
        shape: ModelShape,
        options: Options,
        has_imatrix: bool,
        tied: bool,
        n_attn_v: int,
    ) -> None:
        self.preset = preset
        self.shape = shape
        self.options = options
        self.has_imatrix = has_imatrix
        self.tied = tied
        self.n_attn_v = n_attn_v
        self.seen: dict[str, int] = {"attn_v": 0, "ffn_down": 0, "ffn_gate": 0, "ffn_up": 0}

    def choose(self, kind: str, base: GgmlType, n_per_row: int) -> GgmlType:
        if kind == "output" or (self.tied and kind == "token_embd"):
            return self._output(base, n_per_row)
        if self.preset == "mxfp4_moe":
            return Q8_0  # no experts in this architecture
        if kind == "token_embd":
            return _TOKEN_EMBD.get(self.preset, base)
        i = self._count(kind)
        if self.preset in LOW_BIT:
            return self._low_bit(kind, i, base)
        if kind == "attn_v":
            chosen = self._attn_v(i, base)
            bigger = self.shape.is_70b and chosen in (Q3_K, Q4_K)
            return Q5_K if bigger else chosen
        if kind == "ffn_down":
            return self._ffn_down(i, base)
        if kind in ("attn_q", "attn_k"):
            return {"iq3_xs": IQ3_XXS, "iq3_xxs": IQ2_S}.get(self.preset, base)
        if kind == "attn_output":
            return _ATTN_OUTPUT.get(self.preset, base)
        if kind in ("ffn_gate", "ffn_up") and self.preset == "iq3_xs":
            n = self.shape.n_layer
            return IQ3_XXS if n // 8 <= i < 7 * n // 8 else base
        return base

    def _count(self, kind: str) -> int:
        i = self.seen.get(kind, 0)
        # In the low-bit mixes llama.cpp does not count gate and up; nothing there reads them.
        if kind in self.seen:
            self.seen[kind] = i + 1
        return i

    def _output(self, base: GgmlType, n_per_row: int) -> GgmlType:
        if self.options.output_tensor_type:
            return self.options.output_tensor_type
        if self.preset == "mxfp4_moe" or n_per_row % base.block_size:
            return Q8_0
        if self.preset in LOW_BIT or self.preset == "iq3_xxs":
            return Q5_K
        return base if base is Q8_0 else Q6_K

    def _low_bit(self, kind: str, i: int, base: GgmlType) -> GgmlType:
        finer = self.preset in ("iq2_s", "iq2_m")
        if kind == "attn_v":
            if self.shape.n_gqa >= 4:
                return Q4_K
            return IQ3_S if finer else Q2_K
        if kind == "ffn_down" and i < self.shape.n_layer // 8:
            return IQ3_S if finer else Q2_K
        if kind == "attn_output":
            if self.preset in ("iq1_s", "iq1_m"):
                return IQ2_XXS
            if finer:
                return IQ3_S
        return base

    def _attn_v(self, i: int, base: GgmlType) -> GgmlType:
        shared = self.shape.n_gqa >= 4  # several heads read one V: bits are cheap there
        match self.preset:
            case "q2_k":
                return Q4_K if shared else Q3_K
            case "q2_k_s" | "iq3_xs" | "iq3_s" if shared:
                return Q4_K
            case "iq3_xxs":
                return Q4_K if shared else IQ3_XXS if self.has_imatrix else IQ3_S
            case "iq3_m":
                return Q4_K
            case "q3_k_m":
                return Q5_K if i < 2 else Q4_K
            case "q3_k_l":
                return Q5_K
            case "iq4_nl" | "iq4_xs" if shared:
                return Q5_K
            case "q4_k_m" | "q5_k_m" if use_more_bits(i, self.n_attn_v):
                return Q6_K
            case "q4_k_s" if i < 4:
                return Q5_K
        return base

    def _ffn_down(self, i: int, base: GgmlType) -> GgmlType:
        n = self.shape.n_layer
        first_eighth = i < n // 8
        match self.preset:
            case "q2_k":
                return Q3_K
            case "q2_k_s" if first_eighth:
                return Q4_K
            case "iq3_xxs" if not self.has_imatrix:
                return Q4_K if first_eighth else Q3_K
            case "q3_k_m":
                return Q5_K if i < n // 16 else Q4_K
            case "iq3_m" if first_eighth:
                return Q4_K
            case "q3_k_l":
                return Q5_K
            case "q4_k_m" | "q5_k_m" if use_more_bits(i, n):
                return Q6_K
            case "iq4_nl" | "iq4_xs" if first_eighth and not self.has_imatrix:
                return Q5_K
            case "q4_k_s" if first_eighth:
                return Q5_K
            case "q4_0" if self.has_imatrix and first_eighth:
                return Q4_1
            case "q5_0" if self.has_imatrix and first_eighth:
                return Q5_1
        return base


_TOKEN_EMBD: Mapping[str, GgmlType] = {
    **dict.fromkeys(("iq2_xxs", "iq2_xs", "iq1_s", "iq1_m"), Q2_K),
    **dict.fromkeys(("iq2_s", "iq2_m", "iq3_xxs"), IQ3_S),
    **dict.fromkeys(("tq1_0", "tq2_0", "q2_0"), Q4_K),
}

_ATTN_OUTPUT: Mapping[str, GgmlType] = {
    "q2_k": Q3_K,
    "iq3_xxs": IQ3_S,
    "q3_k_m": Q4_K,
    "q3_k_l": Q5_K,
    "iq3_m": Q4_K,
}


def requires_imatrix(name: str, chosen: GgmlType, preset: Preset) -> bool:
    """`tensor_requires_imatrix`: very low bits without one would be garbage.

    llama-quantize makes an exception for the embedding and the output, also for the types that
    ggml cannot quantize without one (`ggml_quantize_requires_imatrix`): it aborts there.
    """
    if chosen.name in ("iq2_xxs", "iq2_xs", "iq1_s"):
        return True
    if category(name) in ("token_embd", "output"):
        return False
    if chosen is Q2_K:
        return preset.name == "q2_k_s"
    return chosen.name in NEEDS_IMATRIX
