"""The grids of ggml's block types: which values a block can hold, and where its codes lie.

A block's value is `scale * level[code] - minimum`, with one scale (and minimum) for each run of
`run` weights. Here blocks are taken apart into scales and codes, and put together again with other
codes under the same scales: all that rounding on a chosen grid needs.

Layouts are those of ggml-common.h, the arithmetic that of `dequantize_row_*` in ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsq.errors import UnsupportedError
from dsq.quant.scheme import GgmlType

F32Array = npt.NDArray[np.float32]
U8Array = npt.NDArray[np.uint8]
Fields = npt.NDArray[np.void]  # blocks as records of a struct's fields
Scales = Callable[[Fields], "tuple[F32Array, F32Array | None]"]


@dataclass(frozen=True)
class Plane:
    """Pieces of `bits` bits, in the code's bits from `at` on.

    Every run of `width` bytes holds 8 / bits runs of `width` codes: first those in the lowest bits
    of its bytes, then the next higher.
    """

    field: str
    width: int
    bits: int
    at: int = 0

    @property
    def shifts(self) -> npt.NDArray[np.uint8]:
        return np.arange(0, 8, self.bits, dtype=np.uint8)[:, None]

    def read(self, blocks: Fields) -> U8Array:
        """(n_blocks, block_size): this plane's part of each code."""
        runs = blocks[self.field].reshape(len(blocks), -1, 1, self.width)
        pieces = (runs >> self.shifts) & np.uint8((1 << self.bits) - 1)
        return (pieces << np.uint8(self.at)).reshape(len(blocks), -1)

    def write(self, blocks: Fields, codes: U8Array) -> None:
        mask = np.uint8((1 << self.bits) - 1)
        pieces = (codes >> np.uint8(self.at)) & mask
        runs = pieces.reshape(len(blocks), -1, 8 // self.bits, self.width) << self.shifts
        blocks[self.field] = np.bitwise_or.reduce(runs, axis=2).reshape(len(blocks), -1)


@dataclass(frozen=True, eq=False)
class Grid:
    """One type. `levels` ascend; a code is its level's index, stored xor `flip`."""

    name: str
    struct: np.dtype[np.void]
    planes: tuple[Plane, ...]
    levels: F32Array
    run: int  # weights under one scale
    scales: Scales
    flip: int = 0

    def blocks(self, data: U8Array) -> Fields:
        """Bytes (…, row_bytes) as records (n_blocks,)."""
        return np.ascontiguousarray(data).reshape(-1).view(self.struct)

    def codes(self, data: U8Array) -> U8Array:
        """(n_blocks, block_size) indices into `levels`."""
        blocks = self.blocks(data)
        codes = self.planes[0].read(blocks)
        for plane in self.planes[1:]:
            codes |= plane.read(blocks)
        return codes ^ np.uint8(self.flip)

    def unpack(self, data: U8Array) -> tuple[F32Array, F32Array | None]:
        """Scales and minima (n_blocks, block_size / run); None where the type has no minima."""
        with np.errstate(over="ignore", invalid="ignore"):  # a damaged block may hold Inf or NaN
            return self.scales(self.blocks(data))

    def pack(self, data: U8Array, codes: U8Array) -> U8Array:
        """`data` with `codes` (n_blocks, block_size) in place of its own; its scales stay."""
        blocks = self.blocks(data).copy()
        for plane in self.planes:
            plane.write(blocks, codes ^ np.uint8(self.flip))
        return blocks.view(np.uint8).reshape(data.shape)

    def dequantize(self, data: U8Array) -> F32Array:
        """(n_blocks, block_size), equal to ggml's `to_float` bit for bit."""
        scale, minimum = self.unpack(data)
        with np.errstate(over="ignore", invalid="ignore"):
            runs = self.levels[self.codes(data)].reshape(*scale.shape, self.run)
            values: F32Array = scale[..., None] * runs
            if minimum is not None:
                values -= minimum[..., None]
        return values.reshape(len(scale), -1)


def grid(of: GgmlType) -> Grid:
    """The grid of a type. Raises UnsupportedError for one that has none here."""
    found = GRIDS.get(of.name)
    if found is None:
        raise UnsupportedError(f"{of} has no grid of single codes; there are {', '.join(GRIDS)}")
    return found


def _f32(halves: npt.NDArray[np.generic]) -> F32Array:
    return halves.astype(np.float32)[:, None]


def _d(blocks: Fields) -> tuple[F32Array, None]:
    return _f32(blocks["d"]), None


def _d_m(blocks: Fields) -> tuple[F32Array, F32Array]:
    return _f32(blocks["d"]), -_f32(blocks["m"])


def _q2_k(blocks: Fields) -> tuple[F32Array, F32Array]:
    both = blocks["scales"]
    return _f32(blocks["d"]) * (both & 15), _f32(blocks["dmin"]) * (both >> 4)


def _q3_k(blocks: Fields) -> tuple[F32Array, None]:
    low, high = blocks["scales"][:, :8], blocks["scales"][:, 8:]
    scales = np.concatenate([low & 15, low >> 4], axis=1)  # 16: the low four bits
    pairs = (high[:, None] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & 3
    scales |= pairs.reshape(-1, 16) << np.uint8(4)
    return _f32(blocks["d"]) * (scales.astype(np.float32) - 32), None


def _k4(blocks: Fields) -> tuple[F32Array, F32Array]:
    """`get_scale_min_k4`: eight scales and eight minima of 6 bits in 12 bytes."""
    first, second, third = blocks["scales"].reshape(-1, 3, 4).swapaxes(0, 1)
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return _f32(blocks["d"]) * scales, _f32(blocks["dmin"]) * minima


def _q6_k(blocks: Fields) -> tuple[F32Array, None]:
    return _f32(blocks["d"]) * blocks["scales"], None


def _iq4_xs(blocks: Fields) -> tuple[F32Array, None]:
    low = (blocks["scales_l"][:, :, None] >> np.array([0, 4], np.uint8) & 15).reshape(-1, 8)
    high = blocks["scales_h"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    return _f32(blocks["d"]) * ((low | high << 4).astype(np.float32) - 32), None


def _levels(first: int, count: int) -> F32Array:
    return np.arange(first, first + count, dtype=np.float32)


# fmt: off
_IQ4 = np.array(  # kvalues_iq4nl
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
# fmt: on

_NIBBLES_32 = Plane("qs", width=16, bits=4)
_FIFTH_32 = Plane("qh", width=1, bits=1, at=4)
_NIBBLES_256 = Plane("qs", width=32, bits=4)
_PAIRS_256 = Plane("qs", width=32, bits=2)

_GRIDS = (
    Grid(
        "q4_0",
        np.dtype([("d", "<f2"), ("qs", "u1", 16)]),
        (_NIBBLES_32,),
        _levels(-8, 16),
        run=32,
        scales=_d,
    ),
    Grid(
        "q4_1",
        np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)]),
        (_NIBBLES_32,),
        _levels(0, 16),
        run=32,
        scales=_d_m,
    ),
    Grid(
        "q5_0",
        np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)]),
        (_NIBBLES_32, _FIFTH_32),
        _levels(-16, 32),
        run=32,
        scales=_d,
    ),
    Grid(
        "q5_1",
        np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)]),
        (_NIBBLES_32, _FIFTH_32),
        _levels(0, 32),
        run=32,
        scales=_d_m,
    ),
    Grid(
        "q8_0",
        np.dtype([("d", "<f2"), ("qs", "u1", 32)]),
        (Plane("qs", width=32, bits=8),),
        _levels(-128, 256),
        run=32,
        scales=_d,
        flip=0x80,  # int8: the highest bit set means the lower half
    ),
    Grid(
        "q2_k",
        np.dtype([("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")]),
        (_PAIRS_256,),
        _levels(0, 4),
        run=16,
        scales=_q2_k,
    ),
    Grid(
        "q3_k",
        np.dtype([("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")]),
        (_PAIRS_256, Plane("hmask", width=32, bits=1, at=2)),
        _levels(-4, 8),
        run=16,
        scales=_q3_k,
    ),
    Grid(
        "q4_k",
        np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)]),
        (_NIBBLES_256,),
        _levels(0, 16),
        run=32,
        scales=_k4,
    ),
    Grid(
        "q5_k",
        np.dtype(
            [
                ("d", "<f2"),
                ("dmin", "<f2"),
                ("scales", "u1", 12),
                ("qh", "u1", 32),
                ("qs", "u1", 128),
            ]
        ),
        (_NIBBLES_256, Plane("qh", width=32, bits=1, at=4)),
        _levels(0, 32),
        run=32,
        scales=_k4,
    ),
    Grid(
        "q6_k",
        np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")]),
        (Plane("ql", width=64, bits=4), Plane("qh", width=32, bits=2, at=4)),
        _levels(-32, 64),
        run=16,
        scales=_q6_k,
    ),
    Grid(
        "iq4_nl",
        np.dtype([("d", "<f2"), ("qs", "u1", 16)]),
        (_NIBBLES_32,),
        _IQ4,
        run=32,
        scales=_d,
    ),
    Grid(
        "iq4_xs",
        np.dtype([("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)]),
        (Plane("qs", width=16, bits=4),),
        _IQ4,
        run=32,
        scales=_iq4_xs,
    ),
)

GRIDS: dict[str, Grid] = {g.name: g for g in _GRIDS}
