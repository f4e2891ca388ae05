"""Parses the header of one GGUF file.

A parser of our own: `gguf.GGUFReader` takes seconds on a 32k vocabulary, because it makes one
numpy array a field, and trusts counts and lengths. Every number here is checked against the
bytes that are left before anything of that size is allocated or looped over. Limits are those of
`gguf_init_from_reader` in ggml/src/gguf.cpp, and stricter where noted.

Text that is not UTF-8 is an error everywhere, token strings included: byte-level BPE and
SentencePiece vocabularies spell bytes in ASCII or UTF-8, so other bytes mean a damaged file.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from dsq.convert.files import special_kind
from dsq.convert.json_file import shown
from dsq.convert.tensors import TensorInfo
from dsq.errors import InputError, UnsupportedError
from dsq.quant.scheme import BY_ID

UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9
# GGUF value type id → numpy type, little-endian; bool is one byte, zero or not
SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    UINT32: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    BOOL: np.dtype("u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_SCALAR_STRUCTS = {
    id: struct.Struct(f"<{code}") for id, code in zip(SCALARS, "BbHhIifBQqd", strict=True)
}

DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_NAME_BYTES = 63  # GGML_MAX_NAME less the closing zero
MAX_KEY_BYTES = 65535  # the GGUF specification's
MAX_STRING_BYTES = 1 << 30  # GGUF_MAX_STRING_LENGTH
MAX_STRINGS = 1 << 24  # stricter than gguf.cpp: sixteen times the largest vocabulary
_MIN_PAIR_BYTES = 8 + 1 + 4 + 1  # a key of one letter and a byte
_MIN_TENSOR_BYTES = 8 + 0 + 4 + 4 + 8
_INT64_MAX = (1 << 63) - 1

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, eq=False)
class Header:
    """What one file says of itself; tensor offsets count from the file's start."""

    version: int
    alignment: int
    metadata: dict[str, Any]
    metadata_types: dict[str, tuple[int, int | None]]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Parse the header of one GGUF file; errors are those of `read_gguf`."""
    try:
        kind = special_kind(path)
        if kind is not None:
            raise InputError(f"{path}: is {kind}; give a GGUF file")
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{path}: not a GGUF file (it does not begin with GGUF)")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                return _Parser(path, buffer).read()
    except OSError as error:
        raise InputError(f"{path}: cannot read the file: {error.strerror or error}") from error


class _Parser:
    """A position in the file; every read checks first that the bytes are there."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path = path
        self.buffer = buffer
        self.size = len(buffer)
        self.at = 4  # behind the magic

    def read(self) -> Header:
        version = self._version()
        n_tensors = self._count("tensors", _MIN_TENSOR_BYTES)
        n_pairs = self._count("metadata keys", _MIN_PAIR_BYTES)
        metadata: dict[str, Any] = {}
        types: dict[str, tuple[int, int | None]] = {}
        for i in range(n_pairs):
            key = self._string(f"the name of metadata key {i}", MAX_KEY_BYTES)
            if not key or key in metadata:
                raise self._error(f"metadata key {shown(key)} is {'double' if key else 'empty'}")
            metadata[key], types[key] = self._value(key)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if types.get("general.alignment", (UINT32, None))[0] != UINT32:
            raise self._error("general.alignment is not of type uint32")
        if alignment <= 0 or alignment & (alignment - 1):
            raise self._error(f"general.alignment is {alignment}; it must be a power of two")
        infos: dict[str, TensorInfo] = {}
        for i in range(n_tensors):
            info = self._tensor(i, alignment)
            if info.name in infos:
                raise self._error(f"tensor {shown(info.name)} is listed twice")
            infos[info.name] = info
        return Header(
            version=version,
            alignment=alignment,
            metadata=metadata,
            metadata_types=types,
            tensors=self._placed(infos, alignment),
        )

    def _version(self) -> int:
        version: int = self._number(_U32, "the version")
        if version and version & 0xFFFF == 0:
            raise UnsupportedError(
                f"{self.path}: a big-endian GGUF file; convert it with gguf-convert-endian"
            )
        if version not in (2, 3):
            raise UnsupportedError(
                f"{self.path}: GGUF version {version} is not supported (supported: 2, 3); "
                f"convert the model again"
            )
        return version

    def _value(self, key: str) -> tuple[Any, tuple[int, int | None]]:
        what = f"metadata key {shown(key)}"
        kind: int = self._number(_U32, what)
        if kind == STRING:
            return self._string(what, MAX_STRING_BYTES), (kind, None)
        if kind in SCALARS:
            value = self._number(_SCALAR_STRUCTS[kind], what)
            return (value != 0 if kind == BOOL else value), (kind, None)
        if kind != ARRAY:
            raise self._error(f"{what} has the unknown value type {kind}")
        element: int = self._number(_U32, what)
        n: int = self._number(_U64, what)
        if element == STRING:
            return self._strings(n, what), (kind, element)
        if element not in SCALARS:  # nested arrays too: llama.cpp refuses them
            raise self._error(f"{what} is an array of the unknown type {element}")
        dtype = SCALARS[element]
        self._need(n * dtype.itemsize, what)
        array = np.frombuffer(self.buffer, dtype, n, self.at).copy() if n else np.empty(0, dtype)
        self.at += n * dtype.itemsize
        return (array != 0 if element == BOOL else array), (kind, element)

    def _strings(self, n: int, what: str) -> list[str]:
        if n > MAX_STRINGS:
            raise self._error(f"{what} has {n} strings; the limit is {MAX_STRINGS}")
        self._need(8 * n, what)
        # The loop that decides how fast `dsq inspect` is: local names, and no call but these two.
        buffer, at, size, length_at = self.buffer, self.at, self.size, _U64.unpack_from
        strings = []
        try:
            for _ in range(n):
                start = at + 8
                at = start + length_at(buffer, at)[0]
                if at > size:
                    raise self._truncated(what)
                strings.append(str(buffer[start:at], "utf-8"))
        except struct.error:
            raise self._truncated(what) from None
        except UnicodeDecodeError:
            raise self._error(f"{what}: string {len(strings)} is not UTF-8") from None
        self.at = at
        return strings

    def _tensor(self, i: int, alignment: int) -> TensorInfo:
        """One entry of the tensor list; its offset is still relative to the data section."""
        name = self._string(f"the name of tensor {i}", MAX_NAME_BYTES)
        what = f"tensor {shown(name)}"
        n_dims: int = self._number(_U32, what)
        if n_dims > MAX_DIMS:
            raise self._error(f"{what} has {n_dims} dimensions; the limit is {MAX_DIMS}")
        ne = [int(self._number(_U64, what)) for _ in range(n_dims)]
        n_elements = prod(ne)
        if not 0 < n_elements <= _INT64_MAX or max(ne, default=1) > _INT64_MAX:
            raise self._error(f"{what} has the impossible dimensions {ne}")
        type_id: int = self._number(_U32, what)
        type = BY_ID.get(type_id)
        if type is None:
            raise UnsupportedError(
                f"{self.path}: {what} has the ggml type id {type_id}, which dsq does not know; "
                f"the file is newer than dsq or damaged"
            )
        n_per_row = ne[0] if ne else 1
        if n_per_row % type.block_size:
            raise self._error(
                f"{what} has rows of {n_per_row} values; {type} needs a multiple of "
                f"{type.block_size}"
            )
        offset: int = self._number(_U64, what)
        if offset % alignment:
            raise self._error(f"{what} has offset {offset}, no multiple of alignment {alignment}")
        n_bytes = n_elements // type.block_size * type.block_bytes
        return TensorInfo(name, tuple(reversed(ne)), type, self.path, offset, n_bytes)

    def _placed(self, infos: dict[str, TensorInfo], alignment: int) -> dict[str, TensorInfo]:
        """The tensors with absolute offsets, after checking that each has bytes of its own."""
        start = -(-self.at // alignment) * alignment
        before: TensorInfo | None = None
        for info in sorted(infos.values(), key=lambda info: info.offset):
            if before is not None and info.offset < before.offset + before.n_bytes:
                raise self._error(f"tensors {shown(before.name)} and {shown(info.name)} overlap")
            end = start + info.offset + info.n_bytes
            if end > self.size:
                raise self._error(
                    f"tensor {shown(info.name)} ends at byte {end} but the file has {self.size}; "
                    f"the file is truncated, download it again"
                )
            before = info
        return {name: replace(info, offset=start + info.offset) for name, info in infos.items()}

    def _count(self, what: str, min_bytes: int) -> int:
        n: int = self._number(_U64, f"the number of {what}")
        if n * min_bytes > self.size - self.at:
            raise self._error(f"the header claims {n} {what}; the file is too short for so many")
        return n

    def _number(self, of: struct.Struct, what: str) -> Any:
        self._need(of.size, what)
        value = of.unpack_from(self.buffer, self.at)[0]
        self.at += of.size
        return value

    def _string(self, what: str, limit: int) -> str:
        n: int = self._number(_U64, what)
        if n > limit:
            raise self._error(f"{what} has {n} bytes; the limit is {limit}")
        self._need(n, what)
        raw = self.buffer[self.at : self.at + n]
        self.at += n
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            raise self._error(f"{what} is not UTF-8") from None

    def _need(self, n_bytes: int, what: str) -> None:
        if n_bytes > self.size - self.at:
            raise self._truncated(what)

    def _truncated(self, what: str) -> InputError:
        return self._error(f"the file ends inside {what}; it is truncated, download it again")

    def _error(self, message: str) -> InputError:
        return InputError(f"{self.path}: {message}")
