"""Reading llama.cpp's importance matrices: GGUF files, and the older `.dat`.

Source: common/imatrix-loader.cpp and `load_imatrix` in tools/quantize/quantize.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsq.convert.gguf.reader import GgufFile, read_gguf
from dsq.convert.json_file import brief, shown
from dsq.errors import InputError
from dsq.quant.scheme import F32

_SUMS, _COUNTS = ".in_sum2", ".counts"
_AGAIN = "make a new imatrix"
_MAX_CHUNKS = 2**32 - 1  # the key is a uint32, here and in the GGUF that is made with it

F32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Imatrix:
    """Mean squared activation per input channel, by GGUF tensor name; float32."""

    path: Path
    values: Mapping[str, F32Array]
    datasets: tuple[str, ...] = ()
    n_chunks: int = 0


def read_imatrix(path: Path) -> Imatrix:
    """Read either format. Raises InputError for a damaged file or values that are not finite."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise InputError(f"{path}: cannot read the imatrix: {error.strerror}") from error
    return _read_gguf(path) if magic == b"GGUF" else _read_dat(path)


def _check_finite(path: Path, name: str, values: F32Array) -> None:
    if not np.isfinite(values).all():
        raise InputError(f"{path}: {name} has values that are NaN or Inf; {_AGAIN}")


def _read_gguf(path: Path) -> Imatrix:
    file = read_gguf(path)
    for key in ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"):
        if key not in file.metadata:
            raise InputError(f"{path}: {key} is missing; this is no imatrix file")
    datasets = _datasets(file)
    n_chunks = _chunks(file, "imatrix.chunk_count")
    _chunks(file, "imatrix.chunk_size")
    names = {
        tensor.removesuffix(suffix): None  # a set that keeps the order
        for tensor in file.tensors
        for suffix in (_SUMS, _COUNTS)
        if tensor.endswith(suffix)
    }
    values = {name: _means(file, name) for name in names}
    if not values:
        raise InputError(f"{path}: no tensor is named ...{_SUMS}; this is no imatrix file")
    return Imatrix(path, values, datasets, n_chunks)


def _datasets(file: GgufFile) -> tuple[str, ...]:
    value = file.metadata["imatrix.datasets"]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise InputError(
            f"{file.path}: imatrix.datasets is {brief(value)}; a list of strings is needed: "
            f"{_AGAIN}"
        )
    return tuple(value)


def _chunks(file: GgufFile, key: str) -> int:
    value: Any = file.metadata[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_CHUNKS:
        raise InputError(
            f"{file.path}: {key} is {brief(value)}; a number from 0 to {_MAX_CHUNKS} is needed: "
            f"{_AGAIN}"
        )
    return value


def _means(file: GgufFile, name: str) -> F32Array:
    """Sums over counts; there is one count for each equal part of the sums (an expert's)."""
    sums = _floats(file, name + _SUMS)
    counts = _rounded(_floats(file, name + _COUNTS))
    if len(sums) % len(counts):
        raise InputError(
            f"{file.path}: {shown(name + _SUMS)} has {len(sums)} values, but "
            f"{shown(name + _COUNTS)} has {len(counts)}, which does not divide them; {_AGAIN}"
        )
    seen = (counts > 0)[:, None]  # a part that no token reached gets 1: no opinion
    parts = sums.reshape(len(counts), -1)
    mean = np.where(seen, parts / np.where(seen, counts[:, None], np.float32(1)), np.float32(1))
    return np.ascontiguousarray(mean.reshape(-1), dtype=np.float32)


def _floats(file: GgufFile, name: str) -> F32Array:
    info = file.tensors.get(name)
    if info is None:
        raise InputError(f"{file.path}: {shown(name)} is missing; the file is damaged: {_AGAIN}")
    if info.type is not F32:
        raise InputError(
            f"{file.path}: tensor {shown(name)} is of type {info.type}, F32 is needed; {_AGAIN}"
        )
    values: F32Array = file.data(name).view("<f4").astype(np.float32, copy=False)
    _check_finite(file.path, name, values)
    return values


def _rounded(counts: F32Array) -> F32Array:
    """As C's lround: halves away from zero, where numpy's go to the even neighbour."""
    wide = counts.astype(np.float64)
    rounded: F32Array = np.copysign(np.floor(np.abs(wide) + 0.5), wide).astype(np.float32)
    return rounded


class _Cursor:
    """Reads a `.dat` file, refusing to run past its end."""

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.at = path, path.read_bytes(), 0

    def take(self, n_bytes: int, what: str) -> bytes:
        if n_bytes < 0 or self.at + n_bytes > len(self.data):
            raise InputError(f"{self.path}: truncated at {what}; this is no complete imatrix file")
        self.at += n_bytes
        return self.data[self.at - n_bytes : self.at]

    def int32(self, what: str) -> int:
        value: int = struct.unpack("<i", self.take(4, what))[0]
        return value


def _read_dat(path: Path) -> Imatrix:
    cursor = _Cursor(path)
    values: dict[str, F32Array] = {}
    n_entries = cursor.int32("the number of entries")
    if n_entries < 1:
        raise InputError(f"{path}: {n_entries} entries; this is no imatrix file")
    for i in range(n_entries):
        what = f"entry {i + 1} of {n_entries}"
        name = cursor.take(cursor.int32(what), what).decode("utf-8", errors="replace")
        n_calls, n_values = cursor.int32(what), cursor.int32(what)
        if n_values < 1:
            raise InputError(f"{path}: {what} ({name}) has {n_values} values")
        sums = np.frombuffer(cursor.take(4 * n_values, what), dtype="<f4")
        if name in values:
            raise InputError(f"{path}: {name} appears twice")
        _check_finite(path, name, sums)
        values[name] = (sums / np.float32(max(n_calls, 1))).astype(np.float32)
    n_chunks, datasets = 0, ()  # type: int, tuple[str, ...]
    if cursor.at < len(cursor.data):
        n_chunks = cursor.int32("the chunk count")
        if cursor.at < len(cursor.data):
            text = cursor.take(cursor.int32("the dataset"), "the dataset")
            datasets = (text.decode("utf-8", errors="replace"),) if text else ()
    return Imatrix(path, values, datasets, n_chunks)
