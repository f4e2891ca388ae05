"""Making a GGUF's rows of packed matrices, a few at a time, and measuring what they lose."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from dsq.convert.packed import Codes, PackedLinears
from dsq.quant import ggml
from dsq.quant.gptq_blocks import to_blocks
from dsq.quant.gptq_layout import GptqTensor
from dsq.quant.scheme import F32, GgmlType

_IN_FLIGHT = 400 << 20  # bytes
_PART = 1 << 23  # weights dequantized at a time


class Recipe(Enum):
    """How a packed matrix is made into rows."""

    CODES = "codes"  # the same codes, scales and order of rows
    ROUNDED = "rounded"  # dequantized, and stored in another type


@dataclass(frozen=True)
class Made:
    """A matrix to make: `name` in the GGUF, `source` in the directory."""

    name: str
    source: str
    recipe: Recipe
    to: GgmlType


@dataclass(frozen=True)
class Difference:
    """Between what is stored and the source's weights: of one weight, and relative RMS."""

    largest: float
    relative: float


def repacked(
    packed: PackedLinears,
    wanted: Sequence[Made],
    differences: dict[str, Difference],
    threads: int,
) -> Iterator[npt.NDArray[np.uint8]]:
    """The rows of each of `wanted` in turn, (n_out, row bytes); those to come are being made.

    `differences` gets an entry for each that is rounded. What is in memory at once is limited.
    """

    def make(item: Made) -> npt.NDArray[np.uint8]:
        codes = packed.codes(item.source)
        if item.recipe is Recipe.CODES:
            assert isinstance(codes, GptqTensor)
            return to_blocks(codes, item.to)
        rows, differences[item.name] = _rounded(codes, item.to)
        return rows

    largest = max((packed.tensors[item.source].n_elements for item in wanted), default=1)
    ahead = max(1, min(threads, _IN_FLIGHT // (3 * largest)))
    pending: deque[Future[npt.NDArray[np.uint8]]] = deque()
    with ThreadPoolExecutor(ahead, thread_name_prefix="dsq-repack") as pool:
        try:
            for item in wanted:
                pending.append(pool.submit(make, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _rounded(codes: Codes, to: GgmlType) -> tuple[npt.NDArray[np.uint8], Difference]:
    n_in, n_out = codes.codes.shape
    out = np.empty((n_out, to.row_bytes(n_in)), dtype=np.uint8)
    largest, error, norm = 0.0, 0.0, 0.0
    step = max(1, _PART // n_in)
    for start in range(0, n_out, step):
        part = slice(start, start + step)
        values = codes.columns(part).dequantized()
        ggml.quantize_into(values, to, out[part])
        if to is F32:
            continue
        back = ggml.dequantize(out[part], to, n_in)
        back -= values
        largest = max(largest, float(np.abs(back).max()))
        error += float(np.vdot(back, back))
        norm += float(np.vdot(values, values))
    return out, Difference(largest, float(np.sqrt(error / norm)) if norm else 0.0)
