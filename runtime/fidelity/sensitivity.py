"""How much each tensor's rounding costs the output, for every type it could have.

To second order, a change δW of one linear changes the mean KL divergence of the output by

    ½ Σ_o g_o δw_o H δw_oᵀ,    H = E[x xᵀ],    g_o = E[(∂L/∂y_o)²],

with statistics from `dsq calibrate --hessians --gradients` (see `fisher` for L). δW is the error of
ggml's plain rounding with the importance matrix; what error feedback leaves of it is measured in
`after_feedback`. Of a large tensor a seeded sample of rows is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
from dsq.convert.identity import model_identity
from dsq.convert.names import expected_tensors, gguf_name, permuted_heads
from dsq.convert.tensor_plan import interleaved_rows
from dsq.errors import InputError
from dsq.quant import ggml
from dsq.quant.mix import Choice, candidates
from dsq.quant.scheme import GgmlType
from dsq.quant.stats import OUTPUT, Stats, input_of
from dsq.quant.threads import default_threads
from dsq.runtime.decoder import read_tensor

F32Array = npt.NDArray[np.float32]

SAMPLE_ROWS = 1024  # of a tensor, at most
EMBEDDING = "token_embd.weight"


def matrices(checkpoint: HfCheckpoint | GgufCheckpoint) -> dict[str, tuple[int, int]]:
    """The matrices a mix decides on, (n_out, n_in) by GGUF name; the embedding only if tied."""
    found = {}
    for hf, shape in expected_tensors(checkpoint.spec).items():
        name = gguf_name(hf)
        if len(shape) == 2 and (name != EMBEDDING or checkpoint.spec.tied):
            found[name] = (shape[0], shape[1])
    return found


def sensitivities(
    checkpoint: HfCheckpoint | GgufCheckpoint,
    stats: Stats,
    *,
    types: Callable[[int], Sequence[GgmlType]] = candidates,
    n_threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[Choice]]:
    """Every candidate of every matrix, by GGUF name.

    Raises InputError for statistics of another model, or without Hessians and gradients.
    """
    stats.check_model(model_identity(checkpoint))
    if not stats.has_hessians or not stats.gradients:
        raise InputError(
            f"{stats.path}: a mix needs Hessians and gradients; run dsq calibrate with "
            "--hessians --gradients"
        )
    table: dict[str, list[Choice]] = {}
    shapes = matrices(checkpoint)
    hf_names = {gguf_name(hf): hf for hf in expected_tensors(checkpoint.spec)}
    hessian: F32Array = np.empty((0, 0), np.float32)
    of_input = ""
    with ThreadPoolExecutor(n_threads or default_threads()) as pool:
        for done, (name, shape) in enumerate(shapes.items()):
            stage = OUTPUT if name == EMBEDDING else input_of(name)
            if stage != of_input:
                read = stats.inputs[stage].hessian
                assert read is not None, "has_hessians"
                hessian, of_input = read, stage
            weight = read_tensor(checkpoint, hf_names[name]).numpy()
            heads = permuted_heads(name, checkpoint.spec)
            if heads:  # gradients are in GGUF's row order
                weight = weight[interleaved_rows(len(weight), heads)]
            gradient = stats.gradients["output.weight" if name == EMBEDDING else name]
            measure = _Measure(weight, hessian, gradient, stats.inputs[stage].mean_sq)
            klds = pool.map(measure.kld, types(shape[1]))
            table[name] = [
                Choice(of, shape[0] * of.row_bytes(shape[1]), kld)
                for of, kld in zip(types(shape[1]), klds, strict=True)
            ]
            progress(done + 1, len(shapes))
    return table


class _Measure:
    """One tensor's rows (or a sample of them) in any type."""

    def __init__(
        self, weight: F32Array, hessian: F32Array, gradient: F32Array, mean_sq: F32Array
    ) -> None:
        rows: npt.NDArray[np.intp] = np.arange(len(weight))
        if len(weight) > SAMPLE_ROWS:
            rows = np.sort(np.random.default_rng(0).choice(len(weight), SAMPLE_ROWS, replace=False))
        self._weight = np.ascontiguousarray(weight[rows])
        self._gradient = gradient[rows] * np.float32(len(weight) / len(rows))
        self._hessian, self._importance = hessian, mean_sq

    def kld(self, of: GgmlType) -> float:
        data = ggml.quantize(self._weight, of, self._importance if of.is_quantized else None)
        error = ggml.dequantize(data, of, self._weight.shape[1]) - self._weight
        squared = np.einsum("oi,oi->o", error @ self._hessian, error)
        return 0.5 * float(np.dot(self._gradient.astype(np.float64), squared))


def total(table: Mapping[str, Sequence[Choice]], types: Mapping[str, GgmlType]) -> float:
    """The predicted mean KLD of a given choice of types. Raises KeyError for one not measured."""
    by_type = {name: {c.type: c.kld for c in choices} for name, choices in table.items()}
    return sum(by_type[name][types[name]] for name in table)
