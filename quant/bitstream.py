"""Codes of a few bits in 32-bit words: each column one little-endian stream down the rows.

The layout that GPTQ (`qweight`; AutoGPTQ's 32 three-bit codes in three words are the same stream)
and EXL2 (`q_weight`) share. They also share how codes stand for weights: (code − zero) · scale,
zeros and scales by group and column, everything transposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from dsq.errors import InputError

_T = TypeVar("_T", bound=np.generic)
_TILE = 512, 64  # rows, columns: a transposed tile's cache lines are filled while they are there
_CHUNK = 1 << 15  # words at a time: what is shifted and joined stays in a core's cache


def codes_per_run(bits: int) -> int:
    """The least number of codes that fill whole words."""
    return 32 // gcd(32, bits)


def n_words(n_codes: int, bits: int) -> int:
    """Words that hold `n_codes`; the last may be half empty."""
    return -(-n_codes * bits // 32)


def pack_words(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int32]:
    """(n, columns) codes below 2^bits → (ceil(n · bits / 32), columns) words.

    What the last word has left is zero. Raises InputError for a code that has too many bits.
    """
    n, columns = codes.shape
    if bits < 8 and codes.size and codes.max() >> bits:
        raise InputError(f"a code of {codes.max()} does not fit into {bits} bits")
    run = codes_per_run(bits)
    words_per_run = run * bits // 32
    runs = -(-n // run)
    codes = _padded(codes, runs * run).reshape(runs, run, columns)
    words = np.empty((runs, words_per_run, columns), dtype=np.uint32)
    for part in _chunks(runs, words_per_run * columns):
        fields, width = _merged(codes[part], bits)
        out = words[part]
        for i in range(fields.shape[1]):
            word, shift = divmod(i * width, 32)
            if shift == 0:
                out[:, word] = fields[:, i]
                continue
            out[:, word] |= fields[:, i] << np.uint32(shift)
            if shift + width > 32:  # it goes on in the next word
                np.right_shift(fields[:, i], np.uint32(32 - shift), out=out[:, word + 1])
    return words.reshape(-1, columns)[: n_words(n, bits)].view(np.int32)


def _merged(fields: npt.NDArray[Any], width: int) -> tuple[npt.NDArray[Any], int]:
    """(runs, n, columns) fields of `width` bits, joined two and two while they fit into a word.

    In the least type that holds them: a shift in 32 bits for every code would move four times as
    many bytes.
    """
    while 2 * width <= 32:
        merged = fields[:, 1::2].astype(_holding(2 * width))
        merged <<= merged.dtype.type(width)
        merged |= fields[:, 0::2]
        fields, width = merged, 2 * width
    return fields.astype(np.uint32, copy=False), width


def _holding(width: int) -> npt.DTypeLike:
    return np.uint8 if width <= 8 else np.uint16 if width <= 16 else np.uint32


def unpack_words(words: npt.NDArray[np.int32], bits: int, n: int) -> npt.NDArray[np.uint8]:
    """The way back: the first `n` codes of every column, (n, columns)."""
    columns = words.shape[1]
    run = codes_per_run(bits)
    words_per_run = run * bits // 32
    runs = -(-n // run)
    stream = _padded(words.view(np.uint32), runs * words_per_run)
    stream = stream.reshape(runs, words_per_run, columns)
    codes = np.empty((runs, run, columns), dtype=np.uint8)
    mask = np.uint32((1 << bits) - 1)
    for part in _chunks(runs, words_per_run * columns):
        wide = np.empty((part.stop - part.start, columns), dtype=np.uint32)
        for i in range(run):
            word, shift = divmod(i * bits, 32)
            np.right_shift(stream[part, word], np.uint32(shift), out=wide)
            if shift + bits > 32:
                wide |= stream[part, word + 1] << np.uint32(32 - shift)
            wide &= mask
            codes[part, i] = wide
    return codes.reshape(-1, columns)[:n]


def dequantize_transposed(
    codes: npt.NDArray[np.uint8],
    rows: npt.NDArray[np.integer[Any]],
    groups: npt.NDArray[np.integer[Any]],
    zeros: npt.NDArray[np.float32],
    scales: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """Weight (o, i) = (codes[p, o] − zeros[g, o]) · scales[g, o], p = rows[i], g = groups[i].

    (n, columns) codes, (n_groups, columns) zeros and scales → (columns, len(rows)).
    """
    out = np.empty((codes.shape[1], len(rows)), dtype=np.float32)
    for a in range(0, len(rows), _TILE[0]):
        part = slice(a, a + _TILE[0])
        row, group = rows[part], groups[part]
        for c in range(0, codes.shape[1], _TILE[1]):
            columns = slice(c, c + _TILE[1])
            tile = codes[row, columns].astype(np.float32)
            tile -= zeros[group, columns]
            tile *= scales[group, columns]
            out[columns, part] = tile.T
    return out


def _padded(rows: npt.NDArray[_T], n: int) -> npt.NDArray[_T]:
    if len(rows) >= n:
        return np.ascontiguousarray(rows[:n])
    return np.concatenate([rows, np.zeros((n - len(rows), rows.shape[1]), dtype=rows.dtype)])


def _chunks(runs: int, words_per_run: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, words_per_run))
    for start in range(0, runs, step):
        yield slice(start, min(start + step, runs))
