"""A stream of quantized slabs: rows in, ggml blocks out, all cores busy, memory bounded.

Each tensor is cut into slabs (what is written at once) and slabs into chunks (what one thread
converts at a time: small enough to stay in its cache between unpacking, checking and quantizing).
While the consumer writes one slab, the threads work on the next ones, across tensor borders.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dsq.errors import InputError
from dsq.quant import ggml
from dsq.quant.scheme import BF16, F32, GgmlType

CHUNK_VALUES = 1 << 17  # 512 KiB of float32
SLAB_BYTES = 32 << 20
SLABS_AHEAD = 3
F16_MAX = 65504.0


@dataclass(frozen=True)
class Job:
    """One tensor to convert.

    `raw` is (n_rows, stored row bytes) uint8, usually a view of a mapped file; `order`, when
    given, is the source row of each output row. `noise` is a block-step dither (see `dither`).
    """

    name: str
    raw: npt.NDArray[np.uint8]
    stored: GgmlType
    to: GgmlType
    n_per_row: int
    order: npt.NDArray[np.intp] | None = None
    imatrix: npt.NDArray[np.float32] | None = None
    noise: Dither | None = None

    @property
    def is_copy(self) -> bool:
        return self.stored is self.to and self.noise is None


class Stored(Protocol):
    """What `Dither.check` asks of a tensor."""

    @property
    def name(self) -> str: ...
    @property
    def type(self) -> GgmlType: ...


@dataclass(frozen=True)
class Dither:
    """Seeded normal noise, `strength` of each block's step `d`, for weights that sit on a grid.

    A model that was quantized before lies exactly on its old grid, so requantizing it to as many
    bits would show too little drift. Only types whose block starts with an f16 `d` have a step.
    """

    strength: float
    seed: int

    TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")

    def check(self, tensors: Iterable[Stored]) -> None:
        """Raise InputError for a quantized tensor whose blocks do not begin with a step."""
        for tensor in tensors:
            if tensor.type.is_quantized and tensor.type.name not in self.TYPES:
                raise InputError(
                    f"--dither: {tensor.name} is {tensor.type}, whose step is not known; it works "
                    f"on {', '.join(self.TYPES)}"
                )

    def add(
        self,
        values: npt.NDArray[np.float32],
        raw: npt.NDArray[np.uint8],
        stored: GgmlType,
        key: int,
    ) -> None:
        if stored.name not in self.TYPES:
            return  # norms; a matrix of another type is refused by `check`
        blocks = raw.reshape(-1, stored.block_bytes)
        step = np.abs(blocks[:, :2].copy().view(np.float16).astype(np.float32))
        noise = np.random.default_rng((self.seed, key)).standard_normal(
            (len(blocks), stored.block_size), dtype=np.float32
        )
        values.reshape(-1, stored.block_size)[:] += self.strength * step * noise


@dataclass(frozen=True)
class Faults:
    """How many weights cannot be stored."""

    nonfinite: int = 0
    overflows: int = 0

    def __add__(self, other: Faults) -> Faults:
        return Faults(self.nonfinite + other.nonfinite, self.overflows + other.overflows)

    def check(self, job: Job) -> None:
        """Raise InputError naming the tensor, unless all is well."""
        if self.nonfinite:
            raise InputError(
                f"{job.name}: {self.nonfinite} weights are NaN or Inf; the checkpoint is damaged "
                f"(--allow-nonfinite converts it all the same)"
            )
        if self.overflows:
            raise InputError(
                f"{job.name}: {self.overflows} weights are too large for {job.to} (above "
                f"{F16_MAX:.0f}); use bf16 or f32, or another type for this tensor"
            )


@dataclass(frozen=True)
class Slab:
    """Consecutive output rows of `job`, uint8, ready to be written.

    `data` lives in a buffer that is used again: take what you need before asking for the next.
    """

    job: Job
    data: npt.NDArray[np.uint8]
    last: bool

    @property
    def bytes(self) -> memoryview:
        """The rows as they go into a file."""
        return memoryview(np.ascontiguousarray(self.data).data).cast("B")


def quantize_stream(
    jobs: Iterable[Job], *, threads: int, allow_nonfinite: bool = False
) -> Iterator[Slab]:
    """Convert `jobs` in order. Peak memory is about `SLABS_AHEAD` slabs and a chunk a thread.

    Raises InputError naming the tensor and the count when a weight is NaN or Inf, unless
    `allow_nonfinite`.
    """
    local = threading.local()
    free = _Buffers()
    pending: deque[tuple[Job, npt.NDArray[np.uint8], bool, list[Future[Faults]]]] = deque()
    faults: dict[str, Faults] = {}

    def finish() -> Slab:
        job, data, last, futures = pending.popleft()
        for future in futures:
            faults[job.name] = faults.get(job.name, Faults()) + future.result()
        if last and not allow_nonfinite:
            faults[job.name].check(job)
        return Slab(job, data, last)

    with ThreadPoolExecutor(threads, thread_name_prefix="dsq-quantize") as pool:
        try:
            for job in jobs:
                ggml.library().ggml_quantize_init(job.to.id)
                for start, stop in _slabs(job):
                    out, futures = _submit(pool, job, start, stop, local, free)
                    pending.append((job, out, stop == len(job.raw), futures))
                    while len(pending) > SLABS_AHEAD:
                        slab = finish()
                        yield slab
                        free.give(slab.data)
            while pending:
                yield finish()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _slabs(job: Job) -> Iterator[tuple[int, int]]:
    rows = max(1, SLAB_BYTES // job.to.row_bytes(job.n_per_row))
    for start in range(0, len(job.raw), rows):
        yield start, min(start + rows, len(job.raw))


class _Buffers:
    """Slab buffers to use again: fresh memory costs a page fault every 4 KiB."""

    def __init__(self) -> None:
        self._free: list[npt.NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
        size = shape[0] * shape[1]
        for i, buffer in enumerate(self._free):
            if buffer.size >= size:
                return self._free.pop(i)[:size].reshape(shape)
        return np.empty(max(size, SLAB_BYTES), dtype=np.uint8)[:size].reshape(shape)

    def give(self, data: npt.NDArray[np.uint8]) -> None:
        buffer = data.base
        # A copied slab is a view of the source's mapping, not one of ours.
        if isinstance(buffer, np.ndarray) and buffer.ndim == 1 and buffer.flags.owndata:
            self._free.append(buffer)


def _submit(
    pool: ThreadPoolExecutor, job: Job, start: int, stop: int, local: Any, free: _Buffers
) -> tuple[npt.NDArray[np.uint8], list[Future[Faults]]]:
    if job.is_copy and job.order is None:
        out = job.raw[start:stop]
    else:
        out = free.take((stop - start, job.to.row_bytes(job.n_per_row)))
    rows = max(1, CHUNK_VALUES // job.n_per_row)
    return out, [
        pool.submit(_convert, job, a, min(a + rows, stop), out[a - start : a - start + rows], local)
        for a in range(start, stop, rows)
    ]


def _convert(job: Job, start: int, stop: int, out: npt.NDArray[np.uint8], local: Any) -> Faults:
    """Convert rows [start, stop) into `out`."""
    raw = job.raw[start:stop] if job.order is None else job.raw[job.order[start:stop]]
    if job.is_copy:
        if job.order is not None:
            out[:] = raw
        values = ggml.dequantize(raw, job.stored, job.n_per_row)
        return Faults(0 if np.isfinite(_largest(values)) else _count_nonfinite(values))
    size = (stop - start) * job.n_per_row
    scratch = getattr(local, "scratch", None)
    if scratch is None or scratch.size < size:
        scratch = local.scratch = np.empty(size, dtype=np.float32)
    values = scratch[:size].reshape(stop - start, job.n_per_row)
    ggml.dequantize_into(np.ascontiguousarray(raw).reshape(-1), job.stored, values)
    if job.noise is not None:
        job.noise.add(values, raw, job.stored, _key(job.name, start))
    largest = _largest(values)
    bad = 0 if np.isfinite(largest) else _count_nonfinite(values)
    if bad and job.to.is_quantized:
        # ggml's search over a grid aborts the process on NaN.
        np.nan_to_num(values, copy=False, posinf=0.0, neginf=0.0)
    ggml.quantize_into(values, job.to, out, job.imatrix)
    if bad or largest <= F16_MAX or job.to in (F32, BF16):
        return Faults(bad)
    return Faults(0, _count_overflows(job, values, out))


def _largest(values: npt.NDArray[np.float32]) -> float:
    """The largest magnitude; NaN if there is one. Cheaper than a mask of what is finite."""
    return float(np.maximum(values.max(), -values.min()))


def _count_nonfinite(values: npt.NDArray[np.float32]) -> int:
    return int(np.count_nonzero(~np.isfinite(values)))


def _count_overflows(job: Job, values: npt.NDArray[np.float32], out: npt.NDArray[np.uint8]) -> int:
    """Weights so large that what was stored is Inf: f16 values, or block scales in f16."""
    stored = ggml.dequantize(out, job.to, job.n_per_row)
    return 0 if np.isfinite(stored).all() else int(np.count_nonzero(np.abs(values) > F16_MAX))


def _key(name: str, row: int) -> int:
    return int.from_bytes(f"{name}:{row}".encode(), "little")
