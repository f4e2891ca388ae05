"""GPTQ codes as ggml blocks: the same integers and scales in another order, nothing rounded again.

A q4_0 block is 32 weights of one row, (x − 8) · d with x in 0 … 15 and d in f16. A run of 32
inputs of one group is such a block as long as code − zero lies in −8 … 7: symmetric 4-bit codes,
and 2- and 3-bit codes whatever their zeros. Symmetric 8-bit codes are q8_0, asymmetric 4-bit codes
are q4_1 with a minimum of −scale · zero, which f16 rounds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dsq.quant.gptq_layout import GptqTensor
from dsq.quant.scheme import BY_NAME, GgmlType

RUN = 32
Q4_0, Q4_1, Q8_0 = BY_NAME["q4_0"], BY_NAME["q4_1"], BY_NAME["q8_0"]

_TILE = 64  # columns and runs transposed at a time


def run_groups(g_idx: npt.NDArray[np.int32]) -> npt.NDArray[np.int32] | None:
    """The group of each run of 32 inputs; None where a run has inputs of several."""
    if g_idx.size % RUN:
        return None
    runs = g_idx.reshape(-1, RUN)
    return runs[:, 0] if (runs == runs[:, :1]).all() else None


def gathering(g_idx: npt.NDArray[np.int32]) -> npt.NDArray[np.intp] | None:
    """An order of the inputs in which each run of 32 is of one group; None if there is none."""
    order = np.argsort(g_idx, kind="stable")
    return order if run_groups(g_idx[order]) is not None else None


def block_type(zeros: npt.NDArray[np.uint8], bits: int) -> GgmlType | None:
    """The ggml type that has room for these codes; None when there is none (asymmetric 8-bit)."""
    if bits in (2, 3):
        return Q4_0
    symmetric = bool((zeros == 1 << (bits - 1)).all())
    if bits == 4:
        return Q4_0 if symmetric else Q4_1
    return Q8_0 if symmetric else None


def to_blocks(tensor: GptqTensor, to: GgmlType) -> npt.NDArray[np.uint8]:
    """The matrix as rows of `to` blocks, (n_out, row bytes); `to` is `block_type`'s."""
    groups = run_groups(tensor.g_idx)
    assert groups is not None, "inputs of a run are of several groups"
    n_in, n_out = tensor.codes.shape
    quants = _quants(tensor.codes.reshape(-1, RUN, n_out), tensor, groups, to)
    scales = tensor.scales.astype(np.float16)
    heads = [scales] if to is not Q4_1 else [scales, _minimums(tensor.scales, tensor.zeros)]
    out = np.empty((n_out, n_in // RUN, to.block_bytes), dtype=np.uint8)
    for i, head in enumerate(heads):
        by_column = np.ascontiguousarray(head.T)  # (n_out, n_groups)
        out[:, :, 2 * i : 2 * i + 2] = by_column[:, groups, None].view(np.uint8)
    start = 2 * len(heads)
    for c in range(0, n_out, _TILE):
        for r in range(0, len(groups), _TILE):
            tile = quants[r : r + _TILE, :, c : c + _TILE]
            out[c : c + _TILE, r : r + _TILE, start:] = tile.transpose(2, 0, 1)
    return out.reshape(n_out, -1)


def largest_scale_difference(
    scales: npt.NDArray[np.floating[Any]], zeros: npt.NDArray[np.uint8], bits: int, to: GgmlType
) -> float:
    """How far a weight may be off in `to_blocks`: what f16 makes of the scales and the minimums."""
    wide = scales.astype(np.float64)
    off = np.abs(wide - scales.astype(np.float16))
    if to is Q4_1:
        largest = off * ((1 << bits) - 1) + np.abs(-wide * zeros - _minimums(scales, zeros))
    else:
        largest = off * (1 << (bits - 1))
    return float(largest.max())


def _minimums(
    scales: npt.NDArray[np.floating[Any]], zeros: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float16]:
    """The minimum of each q4_1 block: −scale · zero, (n_groups, n_out)."""
    return (-scales.astype(np.float32) * zeros).astype(np.float16)


def _quants(
    codes: npt.NDArray[np.uint8], tensor: GptqTensor, groups: npt.NDArray[Any], to: GgmlType
) -> npt.NDArray[np.uint8]:
    """The integers of the blocks, (runs, bytes a block, n_out), from (runs, 32, n_out) codes."""
    if to is Q8_0:
        return codes ^ np.uint8(128)  # x − 128 as a signed byte
    out = np.empty((codes.shape[0], RUN // 2, codes.shape[2]), dtype=np.uint8)
    move = np.uint8(8) - tensor.zeros[groups][:, None, :] if to is Q4_0 else None
    for start in range(0, len(codes), 8):  # a few runs at a time stay in the cache
        part = slice(start, start + 8)
        levels = codes[part] if move is None else codes[part] + move[part]
        np.left_shift(levels[:, RUN // 2 :], 4, out=out[part])
        out[part] |= levels[:, : RUN // 2]
    return out
