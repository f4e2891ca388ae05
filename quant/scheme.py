"""The ggml tensor types: name, id, block size and bytes per block.

Source: `enum ggml_type` in ggml.h and `type_traits` in ggml.c. A test compares this table with
the libggml that is installed, so it can be plain data here and `dsq inspect` needs no library.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsq.errors import InputError


@dataclass(frozen=True)
class GgmlType:
    """One tensor type. A row of `n` values takes `n / block_size * block_bytes` bytes."""

    name: str
    id: int
    block_size: int
    block_bytes: int

    @property
    def is_quantized(self) -> bool:
        return self.block_size > 1

    @property
    def bpw(self) -> float:
        return 8 * self.block_bytes / self.block_size

    def row_bytes(self, n_per_row: int) -> int:
        """Bytes of one row; `n_per_row` must be a multiple of the block size."""
        if n_per_row % self.block_size:
            raise InputError(
                f"a row of {n_per_row} values does not divide into {self.name} blocks "
                f"of {self.block_size}"
            )
        return n_per_row // self.block_size * self.block_bytes

    def __str__(self) -> str:
        return self.name


_TYPES = (
    GgmlType("f32", 0, 1, 4),
    GgmlType("f16", 1, 1, 2),
    GgmlType("q4_0", 2, 32, 18),
    GgmlType("q4_1", 3, 32, 20),
    GgmlType("q5_0", 6, 32, 22),
    GgmlType("q5_1", 7, 32, 24),
    GgmlType("q8_0", 8, 32, 34),
    GgmlType("q8_1", 9, 32, 36),
    GgmlType("q2_k", 10, 256, 84),
    GgmlType("q3_k", 11, 256, 110),
    GgmlType("q4_k", 12, 256, 144),
    GgmlType("q5_k", 13, 256, 176),
    GgmlType("q6_k", 14, 256, 210),
    GgmlType("q8_k", 15, 256, 292),
    GgmlType("iq2_xxs", 16, 256, 66),
    GgmlType("iq2_xs", 17, 256, 74),
    GgmlType("iq3_xxs", 18, 256, 98),
    GgmlType("iq1_s", 19, 256, 50),
    GgmlType("iq4_nl", 20, 32, 18),
    GgmlType("iq3_s", 21, 256, 110),
    GgmlType("iq2_s", 22, 256, 82),
    GgmlType("iq4_xs", 23, 256, 136),
    GgmlType("i8", 24, 1, 1),
    GgmlType("i16", 25, 1, 2),
    GgmlType("i32", 26, 1, 4),
    GgmlType("i64", 27, 1, 8),
    GgmlType("f64", 28, 1, 8),
    GgmlType("iq1_m", 29, 256, 56),
    GgmlType("bf16", 30, 1, 2),
    GgmlType("tq1_0", 34, 256, 54),
    GgmlType("tq2_0", 35, 256, 66),
    GgmlType("mxfp4", 39, 32, 17),
    GgmlType("nvfp4", 40, 64, 36),
    GgmlType("q1_0", 41, 128, 18),
    GgmlType("q2_0", 42, 64, 18),
)

BY_NAME: dict[str, GgmlType] = {t.name: t for t in _TYPES}
BY_ID: dict[int, GgmlType] = {t.id: t for t in _TYPES}

F32, F16, BF16 = BY_NAME["f32"], BY_NAME["f16"], BY_NAME["bf16"]
FLOAT_TYPES = (F32, F16, BF16)


_NO_TARGET = ("q8_1", "q8_k", "i8", "i16", "i32", "i64", "f64")  # ggml_quantize_chunk aborts


def target_type(name: str) -> GgmlType:
    """The type called `name`, if weights can be stored in it; else an InputError."""
    found = ggml_type(name)
    if found.name in _NO_TARGET:
        targets = ", ".join(n for n in BY_NAME if n not in _NO_TARGET)
        raise InputError(f"weights cannot be quantized to {found}; choose one of: {targets}")
    return found


def ggml_type(name: str) -> GgmlType:
    """The type called `name` (any case), or an InputError that lists the names."""
    found = BY_NAME.get(name.lower())
    if found is None:
        raise InputError(f"unknown tensor type {name!r}; known types: {', '.join(BY_NAME)}")
    return found
