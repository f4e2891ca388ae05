"""TensorPlan: every tensor of the artifact, its source, transform and type, before any I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from dsq.convert.imatrix import Imatrix
from dsq.convert.names import ROPE_FREQS, gguf_name, permuted_heads
from dsq.convert.spec import ModelSpec
from dsq.convert.tensors import TensorInfo
from dsq.errors import InputError
from dsq.quant.plan import (
    ModelShape,
    Options,
    PlanTensor,
    choose_types,
    requires_imatrix,
    tensor_order,
)
from dsq.quant.presets import PRESETS, Preset
from dsq.quant.scheme import F32, GgmlType


@dataclass(frozen=True)
class TensorStep:
    """How one tensor of the artifact comes to be.

    `source` is None for a generated tensor (`rope_freqs.weight`). `heads` asks for the rotary
    row permutation: HF stores Q and K rows half-split, GGUF interleaved.
    """

    name: str
    shape: tuple[int, ...]
    to: GgmlType
    source: TensorInfo | None
    heads: int | None = None

    @property
    def n_bytes(self) -> int:
        return prod(self.shape[:-1]) * self.to.row_bytes(self.shape[-1])

    @property
    def stored(self) -> GgmlType:
        return self.source.type if self.source else F32

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "shape": list(self.shape),
            "source": self.source.name if self.source else None,
            "source_type": self.stored.name,
            "type": self.to.name,
            "permute_heads": self.heads,
            "n_bytes": self.n_bytes,
        }


def interleaved_rows(n_rows: int, heads: int) -> npt.NDArray[np.intp]:
    """Source row of each GGUF row of Q or K (`LlamaModel.permute` in llama.cpp's converter)."""
    return np.arange(n_rows).reshape(heads, 2, n_rows // heads // 2).swapaxes(1, 2).reshape(-1)


def half_split_rows(n_rows: int, heads: int) -> npt.NDArray[np.intp]:
    """The way back: source (GGUF) row of each Hugging Face row."""
    return np.arange(n_rows).reshape(heads, n_rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def auto_outtype(tensors: Iterable[TensorInfo]) -> Preset:
    """`--outtype auto`: the float type most weights are stored in."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        if len(tensor.shape) >= 2:
            sizes[tensor.type.name] = sizes.get(tensor.type.name, 0) + tensor.n_bytes
    most = max(sizes, key=lambda name: sizes[name]) if sizes else "f32"
    return PRESETS[most if most in ("f16", "bf16", "f32") else "f32"]


def plan_from_hf(
    spec: ModelSpec,
    tensors: Mapping[str, TensorInfo],
    preset: Preset,
    options: Options | None = None,
    imatrix: Imatrix | None = None,
) -> tuple[TensorStep, ...]:
    """Hugging Face checkpoint → GGUF. Raises InputError when the preset needs an imatrix."""
    named = {gguf_name(info.name): info for info in tensors.values()}
    choice = _choose(
        # A vector stays f32, as llama.cpp's converter writes it.
        [PlanTensor(n, t.shape, t.type if len(t.shape) > 1 else F32) for n, t in named.items()],
        spec,
        preset,
        options,
        imatrix,
    )
    steps = [
        TensorStep(name, info.shape, choice[name], info, permuted_heads(name, spec))
        for name, info in named.items()
    ]
    if spec.rope.kind == "llama3":
        steps.append(TensorStep(ROPE_FREQS, (spec.head_dim // 2,), F32, None))
    return tuple(sorted(steps, key=lambda s: tensor_order(s.name)))


def plan_from_gguf(
    spec: ModelSpec,
    tensors: Mapping[str, TensorInfo],
    preset: Preset,
    options: Options | None = None,
    imatrix: Imatrix | None = None,
    *,
    allow_requantize: bool = False,
) -> tuple[TensorStep, ...]:
    """GGUF → GGUF of another type. Raises InputError for a file that is quantized already."""
    choice = _choose(
        [PlanTensor(t.name, t.shape, t.type) for t in tensors.values()],
        spec,
        preset,
        options,
        imatrix,
    )
    steps = tuple(
        TensorStep(info.name, info.shape, choice[info.name], info)
        for info in sorted(tensors.values(), key=lambda t: tensor_order(t.name))
    )
    for step in steps:
        if step.stored.is_quantized and step.to is not step.stored and not allow_requantize:
            raise InputError(
                f"{step.name} is {step.stored} already: quantizing it again to {step.to} loses "
                f"more than quantizing the original; use the f16 file, or --allow-requantize"
            )
    return steps


def _choose(
    tensors: Sequence[PlanTensor],
    spec: ModelSpec,
    preset: Preset,
    options: Options | None,
    imatrix: Imatrix | None,
) -> dict[str, GgmlType]:
    shape = ModelShape(spec.n_layer, spec.n_head, spec.n_head_kv)
    choice = choose_types(tensors, preset, shape, options, has_imatrix=imatrix is not None)
    for tensor in tensors:
        to = choice[tensor.name]
        weights = imatrix.values.get(tensor.name) if imatrix else None
        if to is tensor.type:
            continue
        if weights is not None and weights.size != tensor.shape[-1]:
            if tensor.name == "token_embd.weight":
                continue  # llama-quantize ignores it there, and so does `row_weights`
            raise InputError(
                f"imatrix: {weights.size} values for {tensor.name}, whose rows have "
                f"{tensor.shape[-1]}; the imatrix belongs to another model"
            )
        if weights is None and requires_imatrix(tensor.name, to, preset):
            raise InputError(
                f"{preset.name} needs an importance matrix for {tensor.name} ({to}): without one "
                f"the result is garbage; give --imatrix FILE, or use q2_k or larger"
            )
    return choice


def row_weights(step: TensorStep, imatrix: Imatrix | None) -> npt.NDArray[np.float32] | None:
    """The imatrix row for a tensor, or None where llama-quantize uses none."""
    weights = imatrix.values.get(step.name) if imatrix else None
    return weights if weights is not None and weights.size == step.shape[-1] else None
