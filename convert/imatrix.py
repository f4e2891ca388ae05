"""Reading importance matrices: llama.cpp's GGUF files and older `.dat`, and dsq's statistics.

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

from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
from dsq.convert.gguf.reader import GgufFile, read_gguf
from dsq.convert.identity import model_identity
from dsq.convert.json_file import brief, shown
from dsq.errors import InputError
from dsq.quant.scheme import F32
from dsq.quant.stats import Stats, input_of, is_stats, output_sizes, read_stats

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


@dataclass(frozen=True)
class ImatrixSums:
    """What an imatrix GGUF holds, by GGUF tensor name: sums of squares (n), and counts of tokens.

    There is one count for each equal part of the sums (an expert's).
    """

    path: Path
    sums: Mapping[str, F32Array]
    counts: Mapping[str, F32Array]
    datasets: tuple[str, ...]
    n_chunks: int
    chunk_size: int

    def means(self) -> Imatrix:
        values = {name: _means(sums, self.counts[name]) for name, sums in self.sums.items()}
        return Imatrix(self.path, values, self.datasets, self.n_chunks)


def read_imatrix(path: Path, checkpoint: HfCheckpoint | GgufCheckpoint | None = None) -> Imatrix:
    """Read any format. Raises InputError for a damaged file or values that are not finite.

    Statistics tell whose they are: those of another model than `checkpoint` are refused.
    """
    if _magic(path) == b"GGUF":
        return _read_gguf(path).means()
    if is_stats(path):
        stats = read_stats(path)
        if checkpoint is not None:
            stats.check_model(model_identity(checkpoint))
        return sums_of_stats(stats).means()
    return _read_dat(path)


def read_sums(path: Path) -> ImatrixSums:
    """Read an imatrix GGUF or statistics. Raises InputError, for a `.dat` too: it has no sums."""
    if _magic(path) == b"GGUF":
        return _read_gguf(path)
    if is_stats(path):
        return sums_of_stats(read_stats(path))
    raise InputError(
        f"{path}: neither an imatrix GGUF nor statistics (an old .dat counts calls, not tokens; "
        f"llama-imatrix --in-file {path.name} -o imatrix.gguf makes a GGUF of it)"
    )


def sums_of_stats(stats: Stats, *, output: bool = False) -> ImatrixSums:
    """The importance matrix in `stats`, as llama-imatrix would have written it.

    `output` adds that of `output.weight`, as `llama-imatrix --process-output` does.
    """
    sums = {
        name: (stats.inputs[input_of(name)].mean_sq * np.float32(stats.tokens.size))
        for name in output_sizes(stats.model)
        if output or name != "output.weight"
    }
    count = np.array([stats.tokens.size], np.float32)
    return ImatrixSums(
        stats.path,
        sums,
        dict.fromkeys(sums, count),
        datasets=(_dataset(stats),),
        n_chunks=len(stats.tokens),
        chunk_size=stats.n_ctx,
    )


def _dataset(stats: Stats) -> str:
    text = stats.record.get("text")
    name = text.get("name") if isinstance(text, dict) else None
    return name if isinstance(name, str) else stats.path.name


def _magic(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4)
    except OSError as error:
        raise InputError(f"{path}: cannot read the imatrix: {error.strerror}") from error


def _check_finite(path: Path, name: str, values: F32Array) -> None:
    if not np.isfinite(values).all():
        raise InputError(f"{path}: {name} has values that are NaN or Inf; {_AGAIN}")


def _read_gguf(path: Path) -> ImatrixSums:
    file = read_gguf(path)
    for key in ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"):
        if key not in file.metadata:
            raise InputError(f"{path}: {key} is missing; this is no imatrix file")
    datasets = _datasets(file)
    n_chunks = _chunks(file, "imatrix.chunk_count")
    chunk_size = _chunks(file, "imatrix.chunk_size")
    names = {
        tensor.removesuffix(suffix): None  # a set that keeps the order
        for tensor in file.tensors
        for suffix in (_SUMS, _COUNTS)
        if tensor.endswith(suffix)
    }
    if not names:
        raise InputError(f"{path}: no tensor is named ...{_SUMS}; this is no imatrix file")
    pairs = {name: _pair(file, name) for name in names}
    sums, counts = ({name: pair[i] for name, pair in pairs.items()} for i in range(2))
    return ImatrixSums(path, sums, counts, datasets, n_chunks, chunk_size)


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


def _pair(file: GgufFile, name: str) -> tuple[F32Array, F32Array]:
    """Sums and counts of a tensor."""
    sums = _floats(file, name + _SUMS)
    counts = _rounded(_floats(file, name + _COUNTS))
    if len(sums) % len(counts):
        raise InputError(
            f"{file.path}: {shown(name + _SUMS)} has {len(sums)} values, but "
            f"{shown(name + _COUNTS)} has {len(counts)}, which does not divide them; {_AGAIN}"
        )
    return sums, counts


def _means(sums: F32Array, counts: F32Array) -> F32Array:
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
