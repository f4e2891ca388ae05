"""What tells a model from another of the same shape, whatever file it lies in."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
from dsq.convert.names import expected_tensors, gguf_name
from dsq.quant import ggml
from dsq.quant.stats import SHAPE_KEYS

# bf16 values below this may lose bits in f16, so they count as zero.
_LEAST = np.float32(2.0**-13)


def model_identity(checkpoint: HfCheckpoint | GgufCheckpoint) -> dict[str, Any]:
    """The sizes of `SHAPE_KEYS`, `quantized`, and two hashes: see `Stats.check_model`.

    `norms` covers all norm gains, which every format keeps as they are. `weights` covers the first
    row of each matrix, rounded to bf16: the first row has its place in either row order, and a
    checkpoint and the bf16, f16 or f32 GGUF made of it agree.
    """
    spec = checkpoint.spec
    norms, weights = hashlib.sha256(), hashlib.sha256()
    quantized = isinstance(checkpoint, HfCheckpoint) and checkpoint.packed is not None
    for name, shape in expected_tensors(spec).items():
        own = gguf_name(name) if checkpoint.format == "gguf" else name
        info = checkpoint.tensors[own]
        if len(shape) > 1:
            quantized |= info.type.is_quantized
            row = checkpoint.data(own)[: info.type.row_bytes(shape[-1])]
            weights.update(_bf16(ggml.dequantize(row, info.type, shape[-1])))
        elif name.endswith("norm.weight"):
            norms.update(ggml.dequantize(checkpoint.data(own), info.type, shape[-1]).tobytes())
    return {
        **{key: getattr(spec, key) for key in SHAPE_KEYS},
        "quantized": quantized,
        "norms": norms.hexdigest()[:16],
        "weights": weights.hexdigest()[:16],
    }


def _bf16(values: npt.NDArray[np.float32]) -> bytes:
    kept = np.where(np.abs(values) < _LEAST, np.float32(0), values)
    bits = kept.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
