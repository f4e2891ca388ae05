"""Is every tensor of an artifact the source's tensor? Errors by row, in bounded memory."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
from dsq.convert.names import ROPE_FREQS, expected_tensors, hf_name, permuted_heads
from dsq.convert.spec import ModelSpec
from dsq.convert.tensor_plan import half_split_rows
from dsq.convert.tensors import TensorInfo
from dsq.errors import InputError
from dsq.quant import ggml
from dsq.quant.scheme import F32, GgmlType

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.intp]
Checkpoint = HfCheckpoint | GgufCheckpoint

CHUNK_VALUES = 1 << 17  # what one thread compares at a time: both sides stay in its cache

# The most that rounding to a type may cost: relative RMS error of a tensor. ggml's own error was
# measured on normal, uniform, Laplace and Student-t (3 and 4 degrees) weights, with and without
# an imatrix; each bound is 1.3 times the worst of them (f16, bf16: more, for tiny weights). A
# tensor that is another one altogether has an error of 1 or more, whatever the type.
ERROR_BOUND: Mapping[str, float] = {
    "f16": 0.001,
    "bf16": 0.004,
    "q8_0": 0.012,
    "q6_k": 0.037,
    "q5_k": 0.065,
    "q5_1": 0.065,
    "q5_0": 0.09,
    "q4_k": 0.13,
    "q4_1": 0.13,
    "q4_0": 0.17,
    "iq4_nl": 0.14,
    "iq4_xs": 0.14,
    "mxfp4": 0.19,
    "q3_k": 0.26,
    "iq3_s": 0.29,
    "iq3_xxs": 0.33,
    "q2_k": 0.47,
    "iq2_s": 0.5,
    "iq2_xs": 0.55,
    "iq2_xxs": 0.65,
    "iq1_m": 0.73,
    "iq1_s": 0.84,
}
WORST_BOUND = 0.95  # one bit, and ternary types on weights that are not ternary
ROW_MARGIN = 2.0  # one row may be that much worse than its tensor
WORST_ROW = 0.97
SMALL_ROW = 0.01  # of the tensor's RMS: smaller rows sink into the block scales' own rounding


# What `dsq quantize` does to weights on purpose, by the file's own word. Error
# feedback moves weights away from the source's so that the layer's output stays; measured: up to
# 2.5 times plain rounding's error, and single rows of more than their own norm. So its tensors are
# judged as wholes. Distillation scales norm gains by a few percent.
METHOD = "dsq.quantize.method"
COMPENSATED_TIMES = 3.0
DISTILLED_NORM = 0.2


def error_bound(stored: GgmlType, source: GgmlType) -> float:
    """The largest relative RMS error that storing a `source` tensor as `stored` explains."""
    if stored is source or stored is F32:
        return 0.0
    return ERROR_BOUND.get(stored.name, WORST_BOUND)


@dataclass(frozen=True)
class Allowed:
    """How far a tensor may be off: relative RMS, and whether each row is held to it as well."""

    bound: float
    each_row: bool = True


def allowed(name: str, stored: GgmlType, source: GgmlType, method: str) -> Allowed:
    """`name` is the GGUF's or Hugging Face's; `method` like "compensated+distilled", or ""."""
    bound, steps = error_bound(stored, source), method.split("+")
    if "distilled" in steps and "norm.weight" in name:
        return Allowed(DISTILLED_NORM)
    in_layer = name.startswith(("blk.", "model.layers."))
    if in_layer and stored.is_quantized and {"compensated", "distilled"} & {*steps}:
        return Allowed(min(COMPENSATED_TIMES * bound, WORST_BOUND), each_row=False)
    return Allowed(bound)


# The block type whose rounding costs about what a GPTQ or EXL2 matrix of so many bits may.
_LIKE_BITS = {3: "q3_k", 4: "q4_0", 5: "q5_0", 6: "q6_k", 7: "q6_k", 8: "q6_k"}


def allowed_packed(bits: float) -> Allowed:
    """For a matrix of `bits` a weight, scales included, made by error feedback."""
    like = ERROR_BOUND.get(_LIKE_BITS.get(int(bits), ""), WORST_BOUND)
    return Allowed(min(COMPENSATED_TIMES * like, WORST_BOUND), each_row=False)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's rows in Hugging Face's order, dequantized when asked for.

    `heads` is set when the file keeps the rows permuted for the rotation (Q and K of a GGUF).
    """

    checkpoint: Checkpoint
    info: TensorInfo
    heads: int | None = None

    @property
    def n_per_row(self) -> int:
        # The values of a permuted bias move one by one: each value of a vector is a row.
        return 1 if len(self.info.shape) == 1 else self.info.n_per_row

    @property
    def n_rows(self) -> int:
        return self.info.n_elements // self.n_per_row

    @property
    def packed(self) -> tuple[str, float] | None:
        """What a GPTQ or EXL2 matrix is, "gptq 4-bit", and its bits a weight."""
        model = self.checkpoint
        if not isinstance(model, HfCheckpoint) or model.packed is None:
            return None
        if self.info.name not in model.packed.tensors:
            return None
        kind, n_bytes = model.stored_as(self.info.name)
        return kind, 8 * n_bytes / self.info.n_elements

    @cached_property
    def order(self) -> Rows:
        """The file's row of each row."""
        return half_split_rows(self.n_rows, self.heads) if self.heads else np.arange(self.n_rows)

    @property
    def raw(self) -> npt.NDArray[np.uint8]:
        # Asked for each time: a checkpoint keeps no more than one tensor that it has to unpack
        data = self.checkpoint.data(self.info.name)
        return data.reshape(self.n_rows, self.info.type.row_bytes(self.n_per_row))

    def file_rows(self, rows: Rows) -> Floats:
        """Rows by the file's own numbers (n, n_per_row)."""
        return ggml.dequantize(self.raw[rows], self.info.type, self.n_per_row)

    def rows(self, rows: Rows) -> Floats:
        return self.file_rows(self.order[rows])

    def span(self, start: int, stop: int) -> Floats:
        raw = self.raw[self.order[start:stop]] if self.heads else self.raw[start:stop]
        return ggml.dequantize(raw, self.info.type, self.n_per_row)


@dataclass(frozen=True)
class TensorReport:
    """One tensor against its source; `reason` says what is wrong when it is not `ok`."""

    name: str
    type: str
    source_type: str
    shape: tuple[int, ...]
    error: float  # relative RMS
    max_error: float  # largest difference of two weights
    bound: float
    ok: bool
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "type": self.type,
            "source_type": self.source_type,
            "shape": list(self.shape),
            "relative_rms_error": rounded(self.error),
            "max_error": rounded(self.max_error),
            "bound": self.bound,
            "ok": self.ok,
            "reason": self.reason,
        }


def rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None  # JSON has no NaN


@dataclass(frozen=True)
class RowErrors:
    """Squared error and squared norm of each row, and the largest single difference."""

    error: npt.NDArray[np.float64]
    norm: npt.NDArray[np.float64]
    max_error: float

    @property
    def relative(self) -> float:
        norm = float(self.norm.sum())
        error = float(self.error.sum())
        return float(np.sqrt(error / norm)) if norm else float(error > 0)

    def bad_rows(self, bound: float) -> Rows:
        """Rows that rounding does not explain; with a bound of 0 all that differ at all."""
        limit = min(ROW_MARGIN * bound, WORST_ROW) ** 2
        with np.errstate(invalid="ignore", over="ignore"):
            floor = SMALL_ROW**2 * self.norm.mean()
            return np.flatnonzero(~(self.error <= limit * (self.norm + floor)))  # NaN is bad


def named_tensors(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, StoredTensor]:
    """Tensors by Hugging Face name; unknown names stay as they are. Heads are those of `spec`."""
    found: dict[str, StoredTensor] = {}
    for info in checkpoint.tensors.values():
        if checkpoint.format == "hf":
            found[info.name] = StoredTensor(checkpoint, info)
        elif info.name != ROPE_FREQS:
            try:
                name = hf_name(info.name)
            except InputError:
                name = info.name
            found[name] = StoredTensor(checkpoint, info, permuted_heads(info.name, spec))
    return found


def unmatched(
    artifact: Mapping[str, StoredTensor], source: Mapping[str, StoredTensor], spec: ModelSpec
) -> list[str]:
    """What keeps the two sets of tensors from being one to one, in words."""
    expected = expected_tensors(spec)
    problems = [f"{name} is missing" for name in expected if name not in artifact]
    for name, tensor in artifact.items():
        if name not in source:
            tied = name == "lm_head.weight" and spec.tied
            why = "the source ties its head to the embedding" if tied else "the source has none"
            problems.append(f"{tensor.info.name} is too many: {why}")
        elif tensor.info.shape != source[name].info.shape:
            problems.append(
                f"{tensor.info.name} has shape {list(tensor.info.shape)}, the source's is "
                f"{list(source[name].info.shape)}"
            )
    return problems


def compare_tensors(
    artifact: Mapping[str, StoredTensor],
    source: Mapping[str, StoredTensor],
    *,
    threads: int,
    method: str = "",
    progress: Callable[[int], None] = lambda n: None,
) -> list[TensorReport]:
    """Every tensor that both sides have in the same shape, in the source's order.

    `method` is what the artifact says was done to its weights (see `allowed`). `progress` is told
    the artifact's bytes. Peak memory is a few chunks a thread.
    """
    from dsq.convert.verify_reasons import reason

    reports = []
    with ThreadPoolExecutor(threads, thread_name_prefix="dsq-verify") as pool:
        for name, theirs in source.items():
            ours = artifact.get(name)
            if ours is None or ours.info.shape != theirs.info.shape:
                continue
            errors = row_errors(ours, theirs, pool)
            packed = ours.packed if theirs.packed is None else None
            limits = (
                allowed(ours.info.name, ours.info.type, theirs.info.type, method)
                if packed is None
                else allowed_packed(packed[1])
            )
            bound = limits.bound
            bad = (
                errors.bad_rows(bound)
                if limits.each_row
                else np.flatnonzero(~np.isfinite(errors.error))
            )
            ok = errors.relative <= bound and not len(bad)
            reports.append(
                TensorReport(
                    name=ours.info.name,
                    type=ours.info.type.name if packed is None else packed[0],
                    source_type=theirs.info.type.name,
                    shape=ours.info.shape,
                    error=errors.relative,
                    max_error=errors.max_error,
                    bound=bound,
                    ok=ok,
                    reason=None if ok else reason(name, artifact, source, errors, bad, bound),
                )
            )
            release(ours.raw)
            release(theirs.raw)
            progress(ours.info.n_bytes)
    return reports


def release(view: npt.NDArray[np.uint8]) -> None:
    """Let go of a mapped tensor's pages, so that resident memory is one tensor, not the model.

    Reading it again brings them back. Does nothing for arrays that are no part of a mapped file.
    """
    base: Any = view
    while isinstance(base, np.ndarray):
        base = base.base
    if not isinstance(base, mmap.mmap) or not hasattr(base, "madvise") or not view.size:
        return
    start = view.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (start + view.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        base.madvise(mmap.MADV_DONTNEED, first, last - first)


def row_errors(ours: StoredTensor, theirs: StoredTensor, pool: ThreadPoolExecutor) -> RowErrors:
    """Compare two tensors of one shape, row by row."""
    n_rows, step = theirs.n_rows, max(1, CHUNK_VALUES // theirs.n_per_row)
    error, norm = np.empty(n_rows), np.empty(n_rows)
    _ = ours.raw, ours.order, theirs.raw, theirs.order  # once, not in every thread

    def chunk(start: int) -> float:
        stop = min(start + step, n_rows)
        wanted = theirs.span(start, stop)
        with np.errstate(over="ignore", invalid="ignore"):
            norm[start:stop] = np.einsum("ij,ij->i", wanted, wanted)
            difference = np.subtract(ours.span(start, stop), wanted, out=wanted)
            error[start:stop] = np.einsum("ij,ij->i", difference, difference)
            return float(np.abs(difference, out=difference).max(initial=0.0))

    largest = list(pool.map(chunk, range(0, n_rows, step)))
    return RowErrors(error, norm, max(largest, default=0.0))
