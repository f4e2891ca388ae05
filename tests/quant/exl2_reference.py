"""What exllamav2 makes of an EXL2 matrix, after its CUDA sources; shares no code with dsq.

Follows exllamav2 0.3.2: `make_q_matrix` and `make_group_map_py` (ext.py), the constructor and
`reconstruct_kernel` of cuda/q_matrix.cu, cuda/quant/qdq_*.cuh as they are without shuffling (which
changes where in a word a code lies, on load, and not its value), and `MatrixView_q4_row`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]  # (columns)


def exb(q: Words, shift: int, mask: int) -> npt.NDArray[np.int64]:
    return ((q >> np.uint32(shift)) & np.uint32(mask)).astype(np.int64)


def exb2(q1: Words, q0: Words, shift: int, mask: int) -> npt.NDArray[np.int64]:
    """A code across two words: the funnel shift of q1:q0."""
    wide = (q1.astype(np.uint64) << np.uint64(32)) | q0.astype(np.uint64)
    return ((wide >> np.uint64(shift)) & np.uint64(mask)).astype(np.int64)


# Each takes the words of one stretch, and gives its codes from the top row down.


def codes_2(q: list[Words]) -> list[Any]:  # dequant_2bit_16
    return [exb(q[0], i * 2, 0x03) for i in range(16)]


def codes_3(q: list[Words]) -> list[Any]:  # dequant_3bit_32
    return [
        *(exb(q[0], i * 3, 0x07) for i in range(10)),
        exb2(q[1], q[0], 30, 0x07),
        *(exb(q[1], i * 3 + 1, 0x07) for i in range(10)),
        exb2(q[2], q[1], 31, 0x07),
        *(exb(q[2], i * 3 + 2, 0x07) for i in range(10)),
    ]


def codes_4(q: list[Words]) -> list[Any]:  # dequant_4bit_8
    return [exb(q[0], i * 4, 0x0F) for i in range(8)]


def codes_5(q: list[Words]) -> list[Any]:  # dequant_5bit_32
    return [
        *(exb(q[0], i * 5, 0x1F) for i in range(6)),
        exb2(q[1], q[0], 30, 0x1F),
        *(exb(q[1], i * 5 + 3, 0x1F) for i in range(5)),
        exb2(q[2], q[1], 28, 0x1F),
        *(exb(q[2], i * 5 + 1, 0x1F) for i in range(6)),
        exb2(q[3], q[2], 31, 0x1F),
        *(exb(q[3], i * 5 + 4, 0x1F) for i in range(5)),
        exb2(q[4], q[3], 29, 0x1F),
        *(exb(q[4], i * 5 + 2, 0x1F) for i in range(6)),
    ]


def codes_6(q: list[Words]) -> list[Any]:  # dequant_6bit_16
    return [
        *(exb(q[0], i * 6, 0x3F) for i in range(5)),
        exb2(q[1], q[0], 30, 0x3F),
        *(exb(q[1], i * 6 + 4, 0x3F) for i in range(4)),
        exb2(q[2], q[1], 28, 0x3F),
        *(exb(q[2], i * 6 + 2, 0x3F) for i in range(5)),
    ]


def codes_8(q: list[Words]) -> list[Any]:  # dequant_8bit_8
    return [
        *(exb(q[0], i * 8, 0xFF) for i in range(4)),
        *(exb(q[1], i * 8, 0xFF) for i in range(4)),
    ]


# width: (zero, words of a stretch, stretches the kernel takes at once, codes)
STRETCHES = {
    8: (128, 2, 4, codes_8),
    6: (32, 3, 2, codes_6),
    5: (16, 5, 1, codes_5),
    4: (8, 1, 4, codes_4),
    3: (4, 3, 1, codes_3),
    2: (2, 1, 1, codes_2),
}


def group_map(q_groups: list[int], n_words: int) -> list[tuple[int, int]]:
    """Of each row its group, and how many rows of it are left."""
    found = []
    for i in range(len(q_groups) // 2):
        bits, first = q_groups[2 * i], q_groups[2 * i + 1]
        last = q_groups[2 * i + 3] if 2 * i + 3 < len(q_groups) else n_words
        rows = (last - first) * 32 // bits
        found += [(i, rows - j) for j in range(rows)]
    return found


def row_bounds(q_groups: list[int], height: int) -> dict[int, int]:
    """Where the rows of each width end: rows_8, rows_6, … of the constructor."""
    rows = dict.fromkeys(STRETCHES, 0)
    row = 0
    n_groups = len(q_groups) // 2
    for i in range(n_groups):
        bits = q_groups[2 * i]
        if i < n_groups - 1:
            here = (q_groups[2 * i + 3] - q_groups[2 * i + 1]) * 32 // bits
        else:
            here = height - row
        rows[bits] += here
        row += here
    end, bounds = 0, {}
    for bits in STRETCHES:  # from 8 down
        end += rows[bits]
        bounds[bits] = end
    return bounds


def scale(q_scale: Words, q_scale_max: np.float16, columns: int) -> npt.NDArray[np.float16]:
    """dq_scale of one group: `q_scale` (columns / 8); the 1/256 of make_q_matrix is in the max."""
    n = np.arange(columns)
    item = (q_scale[n // 8] >> (n % 8 * 4).astype(np.uint32)) & np.uint32(0x0F)
    qs = (item.astype(np.int64) + 1) ** 2
    return qs.astype(np.float16) * q_scale_max


def reconstruct(parts: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float16]:
    """The matrix (n_in, columns) in f16, its input rows in their own order, padding included."""
    words = parts["q_weight"].view(np.uint32)
    scales = parts["q_scale"].view(np.uint32)
    q_scale_max = parts["q_scale_max"] * np.float16(1 / 256)
    q_groups = parts["q_groups"].view(np.uint16).tolist()
    invperm = parts["q_invperm"].tolist()
    perm = np.argsort(invperm)
    height, columns = len(invperm), words.shape[1]
    where = group_map(q_groups, len(words))
    assert len(where) == height, "q_group_map tells the kernel the height"
    bounds = row_bounds(q_groups, height)
    out = np.full((height, columns), np.nan, np.float16)

    k = at = lk = 0
    group, left = where[0]
    next_group = left
    qs = scale(scales[group], q_scale_max[group], columns)
    for bits, (zero, n_words, times, codes) in STRETCHES.items():
        while k < bounds[bits]:
            if k == next_group:
                group += 1
                qs = scale(scales[group], q_scale_max[group], columns)
                next_group += where[k][1]
            for _ in range(times):
                taken = [words[at + i] for i in range(n_words)]
                at += n_words
                for code in codes(taken):
                    out[perm[lk]] = (code - zero).astype(np.float16) * qs
                    lk += 1
            k += 16 if bits == 2 else 32
    assert (at, lk) == (len(words), height), "all words read, all rows made"
    return out
