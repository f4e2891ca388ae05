"""Reading llama.cpp's importance matrices: GGUF files, and the older `.dat`.

Source: common/imatrix-loader.cpp and `load_imatrix` in tools/quantize/quantize.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dsq.convert.gguf.reader import read_gguf
from dsq.errors import InputError

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
    imatrix = _read_gguf(path) if magic == b"GGUF" else _read_dat(path)
    for name, values in imatrix.values.items():
        if not np.isfinite(values).all():
            raise InputError(f"{path}: {name} has values that are NaN or Inf; make a new imatrix")
    return imatrix


def _read_gguf(path: Path) -> Imatrix:
    file = read_gguf(path)
    missing = [
        key
        for key in ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
        if key not in file.metadata
    ]
    if missing:
        raise InputError(f"{path}: {missing[0]} is missing; this is no imatrix file")
    values = {}
    for full_name in file.tensors:
        name = full_name.removesuffix(".in_sum2")
        if name == full_name:
            continue
        if f"{name}.counts" not in file.tensors:
            raise InputError(f"{path}: {full_name} has no counts beside it; the file is damaged")
        sums = file.data(full_name).view(np.float32)
        counts = np.rint(file.data(f"{name}.counts").view(np.float32)).astype(np.float32)
        per_count = sums.reshape(len(counts), -1)
        safe = np.where(counts > 0, counts, 1)[:, None]
        mean = np.where(counts[:, None] > 0, per_count / safe, np.float32(1))
        values[name] = np.ascontiguousarray(mean.reshape(-1), dtype=np.float32)
    return Imatrix(
        path,
        values,
        tuple(file.metadata["imatrix.datasets"]),
        int(file.metadata["imatrix.chunk_count"]),
    )


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
        values[name] = (sums / np.float32(max(n_calls, 1))).astype(np.float32)
    n_chunks, datasets = 0, ()  # type: int, tuple[str, ...]
    if cursor.at < len(cursor.data):
        n_chunks = cursor.int32("the chunk count")
        if cursor.at < len(cursor.data):
            text = cursor.take(cursor.int32("the dataset"), "the dataset")
            datasets = (text.decode("utf-8", errors="replace"),) if text else ()
    return Imatrix(path, values, datasets, n_chunks)
