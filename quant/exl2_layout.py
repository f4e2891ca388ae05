"""One EXL2 linear: its codes, and the tensors that exllamav2's kernels read.

Everything is transposed (input rows × output columns) and the rows are permuted: packed row p is
input perm[p], input i is packed row invperm[i]. Groups of rows have their own bit width, each row
of groups one f16 scale, and each group and column a 4-bit factor of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dsq.errors import InputError
from dsq.quant.bitstream import (
    codes_per_run,
    dequantize_transposed,
    n_words,
    pack_words,
    unpack_words,
)

EXL2_BITS = (2, 3, 4, 5, 6, 8)
PARTS = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")
COLUMNS = 32  # columns are padded to a multiple of this


@dataclass(frozen=True, eq=False)
class Exl2Tensor:
    """Weight (o, i) is (codes[p, o] − 2^(bits−1)) · scale[g, o], p = invperm[i], g the group of p.

    codes: u8 (n_in, n_out), in packed row order; group_bits, group_rows: integers (n_groups,);
    scale_codes: u8 (n_groups, n_out), the stored 0 … 15; scale_max: f16 (n_groups,);
    invperm: i32 (n_in,). The scales themselves are `scales()`.
    """

    codes: npt.NDArray[np.uint8]
    group_bits: npt.NDArray[np.integer[Any]]
    group_rows: npt.NDArray[np.integer[Any]]
    scale_codes: npt.NDArray[np.uint8]
    scale_max: npt.NDArray[np.float16]
    invperm: npt.NDArray[np.int32]

    def scales(self) -> npt.NDArray[np.float32]:
        """The scale of each group and column, (n_groups, n_out)."""
        return scale_values(self.scale_codes, self.scale_max[:, None])

    def columns(self, which: slice) -> Exl2Tensor:
        """Some of the outputs."""
        return replace(self, codes=self.codes[:, which], scale_codes=self.scale_codes[:, which])

    def dequantized(self) -> npt.NDArray[np.float32]:
        """The weights: f32 (n_out, n_in), Hugging Face's orientation."""
        scales = self.scales()
        zeros = np.exp2(self.group_bits - 1.0).astype(np.float32)[:, None]
        groups = np.repeat(np.arange(len(self.group_bits)), self.group_rows)
        return dequantize_transposed(
            self.codes,
            self.invperm,
            groups[self.invperm],
            np.broadcast_to(zeros, scales.shape),
            scales,
        )


def scale_values(
    scale_codes: npt.NDArray[np.uint8], scale_max: npt.NDArray[np.float16]
) -> npt.NDArray[np.float32]:
    """(code + 1)² · scale_max / 256 as exllamav2 has it, in f16 throughout.

    scale_max / 256 is often too small for f16's full precision, so the two roundings matter:
    `make_q_matrix` in exllamav2/ext.py and `dq_scale` in cuda/quant/qdq_util.cuh.
    """
    square = (scale_codes.astype(np.float16) + np.float16(1)) ** 2
    return (square * (scale_max * np.float16(1 / 256))).astype(np.float32)


def check_groups(
    group_bits: npt.NDArray[np.integer[Any]], group_rows: npt.NDArray[np.integer[Any]], n_in: int
) -> None:
    """Raise InputError for groups that exllamav2 could not find its way through."""
    if len(group_bits) == 0 or len(group_bits) != len(group_rows):
        raise InputError(f"{len(group_bits)} bit widths for {len(group_rows)} groups of rows")
    if int(group_rows.sum()) != n_in or int(group_rows.min()) < 1:
        raise InputError(f"the groups have {group_rows.tolist()} rows, together not {n_in}")
    unknown = set(group_bits.tolist()) - set(EXL2_BITS)
    if unknown:
        raise InputError(f"EXL2 has {', '.join(map(str, EXL2_BITS))} bits, not {unknown.pop()}")
    if (np.diff(group_bits) > 0).any():
        raise InputError("the groups' bits grow from one group to the next; EXL2 wants them sorted")
    for bits, rows in zip(group_bits[:-1].tolist(), group_rows[:-1].tolist(), strict=True):
        if rows % codes_per_run(bits):
            raise InputError(
                f"a group of {rows} rows at {bits} bits does not fill whole words: "
                f"{codes_per_run(bits)} rows do"
            )


def pack(tensor: Exl2Tensor) -> dict[str, npt.NDArray[Any]]:
    """`q_weight` i32 (words, columns), `q_scale` i32 (n_groups, columns / 8), `q_scale_max` f16
    (n_groups,), `q_groups` i16 (2 · n_groups,) and `q_invperm` i32 (n_in,).

    Columns are padded to a multiple of 32 with weights of 0, as exllamav2 does. It makes `q_perm`
    from `q_invperm` itself, and writes none. Raises InputError for codes of too many bits and
    groups that cannot be packed.
    """
    n_in, n_out = tensor.codes.shape
    check_groups(tensor.group_bits, tensor.group_rows, n_in)
    check_permutation(tensor.invperm, n_in)
    columns = -(-n_out // COLUMNS) * COLUMNS
    words, starts, row, at = [], [], 0, 0
    for bits, rows in zip(tensor.group_bits.tolist(), tensor.group_rows.tolist(), strict=True):
        codes = tensor.codes[row : row + rows]
        if columns > n_out:
            pad = np.full((rows, columns - n_out), 1 << (bits - 1), dtype=np.uint8)
            codes = np.concatenate([codes, pad], axis=1)
        words.append(pack_words(codes, bits))
        starts += [bits, at]
        row, at = row + rows, at + len(words[-1])
    scale_codes = np.full((len(starts) // 2, columns), 15, dtype=np.uint8)
    scale_codes[:, :n_out] = tensor.scale_codes
    return {
        "q_weight": np.concatenate(words),
        "q_scale": np.ascontiguousarray(pack_words(scale_codes.T, 4).T),
        "q_scale_max": np.ascontiguousarray(tensor.scale_max, dtype=np.float16),
        "q_groups": np.array(starts, dtype=np.uint16).view(np.int16),
        "q_invperm": np.ascontiguousarray(tensor.invperm, dtype=np.int32),
    }


def unpack(parts: Mapping[str, npt.NDArray[Any]], n_out: int | None = None) -> Exl2Tensor:
    """The linear that `parts` (the names of `PARTS`, shaped as by `pack`) hold.

    `n_out` leaves out the padding columns, whose number no tensor tells. Raises InputError where
    the shapes disagree, the groups make no sense, or q_invperm is no permutation.
    """
    q_weight, q_scale, scale_max, q_groups, invperm = (parts[name] for name in PARTS)
    n_in, columns = invperm.size, q_weight.shape[1]
    n_groups = scale_max.size
    if columns % COLUMNS or (n_out is not None and not columns - COLUMNS < n_out <= columns):
        of = "a multiple of 32" if n_out is None else f"{n_out}, padded to a multiple of 32"
        raise InputError(f"q_weight has {columns} columns; expected {of}")
    for name, shape in (("q_groups", (2 * n_groups,)), ("q_scale", (n_groups, columns // 8))):
        if parts[name].shape != shape:
            raise InputError(f"{name} is {list(parts[name].shape)}, not {list(shape)}")
    group_bits, group_rows, starts = read_groups(q_groups, n_in, len(q_weight))
    check_permutation(invperm, n_in)
    codes = np.empty((n_in, columns), dtype=np.uint8)
    row = 0
    for g, (bits, rows) in enumerate(zip(group_bits.tolist(), group_rows.tolist(), strict=True)):
        words = q_weight[starts[g] : starts[g + 1]]
        codes[row : row + rows] = unpack_words(words, bits, rows)
        row += rows
    scale_codes = unpack_scale_codes(q_scale, columns)
    return Exl2Tensor(
        codes[:, :n_out],
        group_bits,
        group_rows,
        np.ascontiguousarray(scale_codes[:, :n_out]),
        scale_max,
        invperm,
    )


def unpack_scale_codes(q_scale: npt.NDArray[np.int32], columns: int) -> npt.NDArray[np.uint8]:
    """The first `columns` of q_scale's codes: u8 (n_groups, columns)."""
    return unpack_words(np.ascontiguousarray(q_scale.T), 4, columns).T


def read_groups(
    q_groups: npt.NDArray[np.int16], n_in: int, n_packed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Bits and rows of each group, and where its words begin (one more: where the last ends).

    Raises InputError for groups that do not fill `n_packed` rows of words with `n_in` rows.
    """
    pairs = q_groups.view(np.uint16).reshape(-1, 2).astype(np.int64)
    group_bits, starts = pairs[:, 0], np.append(pairs[:, 1], n_packed)
    unknown = set(group_bits.tolist()) - set(EXL2_BITS)
    if unknown:
        raise InputError(f"EXL2 has {', '.join(map(str, EXL2_BITS))} bits, not {unknown.pop()}")
    words = np.diff(starts)
    if starts[0] != 0 or (words < 1).any():
        raise InputError(f"q_groups begin at the packed rows {starts[:-1].tolist()} of {n_packed}")
    group_rows = words * 32 // group_bits
    group_rows[-1] = n_in - group_rows[:-1].sum()  # its last word may be half empty
    check_groups(group_bits, group_rows, n_in)
    if words[-1] != n_words(int(group_rows[-1]), int(group_bits[-1])):
        raise InputError(
            f"q_weight has {n_packed} packed rows, but {n_in} inputs in these groups take "
            f"{int(starts[-2]) + n_words(int(group_rows[-1]), int(group_bits[-1]))}"
        )
    return group_bits, group_rows, starts


def check_permutation(invperm: npt.NDArray[np.int32], n_in: int) -> None:
    """Raise InputError for a q_invperm that is none of `n_in` rows."""
    seen = np.zeros(n_in, dtype=bool)
    inside = invperm[(invperm >= 0) & (invperm < n_in)]
    seen[inside] = True
    if invperm.shape != (n_in,) or not seen.all():
        raise InputError(f"q_invperm is no permutation of {n_in} rows")
