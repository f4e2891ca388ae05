"""Put other scales into a block: the way back from `Grid.unpack`.

A K-quant's block stores its runs' scales as small integers times one f16 `d` (and `dmin`), so a
wanted scale becomes the nearest that can be stored. `d` stays as it is unless the wanted scales
outgrow its integers: then it grows until they fit.

Layouts are those of ggml-common.h; see `grids` for the reading side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsq.errors import UnsupportedError
from dsq.quant.grids import F32Array, Fields, Grid, U8Array

Codes = npt.NDArray[np.int16]
F16_MAX = 65504.0


@dataclass(frozen=True)
class Integers:
    """How a type stores its runs' scales: integers low … high, times `d`."""

    low: int
    high: int
    write: Callable[[Fields, Codes, Codes | None], None]


def with_scales(grid: Grid, data: U8Array, scale: F32Array, minimum: F32Array | None) -> U8Array:
    """`data` with other scales and minima (n_blocks, runs), as near as its type stores them.

    The codes stay. Raises UnsupportedError for a type whose scales are not known here.
    """
    blocks = grid.blocks(data).copy()
    integers = _INTEGERS.get(grid.name)
    if integers is not None:
        codes = _codes(blocks, "d", scale, integers.low, integers.high)
        minima = None if minimum is None else _codes(blocks, "dmin", minimum, 0, integers.high)
        integers.write(blocks, codes, minima)
    elif grid.name in ("q4_0", "q5_0", "q8_0", "iq4_nl", "q4_1", "q5_1"):
        blocks["d"] = _f16(scale[:, 0])
        if minimum is not None:
            blocks["m"] = _f16(-minimum[:, 0])
    else:
        raise UnsupportedError(f"{grid.name}: dsq cannot change the scales of this type")
    return blocks.view(np.uint8).reshape(data.shape)


def _f16(values: F32Array) -> npt.NDArray[np.float16]:
    return np.clip(values, -F16_MAX, F16_MAX).astype(np.float16)


def _codes(blocks: Fields, field: str, wanted: F32Array, low: int, high: int) -> Codes:
    """The integers of `wanted` (n_blocks, runs) over the field's step, which may grow for them."""
    step = blocks[field].astype(np.float32)
    # A block whose step is zero holds zeros, whatever its codes: there is nothing to scale.
    ratio = wanted / np.where(step == 0, 1, step)[:, None]
    ratio[step == 0] = 0
    growth = np.maximum(ratio.max(axis=1) / high, 1)
    if low < 0:
        growth = np.maximum(growth, ratio.min(axis=1) / low)
    grown = growth > 1
    if grown.any():
        # Rounded up in f16, so that the largest code does not pass `high` again.
        blocks[field][grown] = _f16(step[grown] * growth[grown] * np.float32(1 + 2**-10))
        step = blocks[field].astype(np.float32)
        ratio = wanted / np.where(step == 0, 1, step)[:, None]
        ratio[step == 0] = 0
    codes: Codes = np.clip(np.rint(ratio), low, high).astype(np.int16)
    return codes


def _write_q2_k(blocks: Fields, scales: Codes, minima: Codes | None) -> None:
    assert minima is not None, "q2_k has minima"
    blocks["scales"] = scales | minima << 4


def _write_q3_k(blocks: Fields, scales: Codes, minima: Codes | None) -> None:
    codes = scales + 32
    pairs = (codes >> 4).reshape(-1, 4, 4) << np.arange(0, 8, 2)[:, None]  # (n, shift, byte)
    low = (codes[:, :8] & 15) | (codes[:, 8:] & 15) << 4
    blocks["scales"] = np.concatenate([low, np.bitwise_or.reduce(pairs, axis=1)], axis=1)


def _write_k4(blocks: Fields, scales: Codes, minima: Codes | None) -> None:
    assert minima is not None, "q4_k and q5_k have minima"
    first, last = (slice(0, 4), slice(4, 8))
    blocks["scales"] = np.concatenate(
        [
            scales[:, first] | scales[:, last] >> 4 << 6,
            minima[:, first] | minima[:, last] >> 4 << 6,
            (scales[:, last] & 15) | (minima[:, last] & 15) << 4,
        ],
        axis=1,
    )


def _write_q6_k(blocks: Fields, scales: Codes, minima: Codes | None) -> None:
    blocks["scales"] = scales


def _write_iq4_xs(blocks: Fields, scales: Codes, minima: Codes | None) -> None:
    codes = scales + 32
    blocks["scales_l"] = (codes[:, ::2] & 15) | (codes[:, 1::2] & 15) << 4
    high = (codes >> 4).astype(np.uint16) << np.arange(0, 16, 2, dtype=np.uint16)
    blocks["scales_h"] = np.bitwise_or.reduce(high, axis=1)


_INTEGERS = {
    "q2_k": Integers(0, 15, _write_q2_k),
    "q3_k": Integers(-32, 31, _write_q3_k),
    "q4_k": Integers(0, 63, _write_k4),
    "q5_k": Integers(0, 63, _write_k4),
    "q6_k": Integers(-128, 127, _write_q6_k),
    "iq4_xs": Integers(-32, 31, _write_iq4_xs),
}
