"""Reference predictions on disk, so that a second candidate is measured in half the time.

One file an entry, one record a window of text. The folder is bounded: the entries used longest
ago make room. Anything wrong with an entry (cut short, bits changed, written by another version)
makes it count as absent.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from dsq.errors import DsqError
from dsq.quant.drift import PackedRows

DEFAULT_LIMIT = 8 << 30
_HEADER = struct.Struct("<8s4Q24x")  # magic, version, windows, rows a window, vocabulary
_MAGIC, _VERSION = b"dsq-ref\0", 1
_SUFFIX = ".dsqref"
_STALE = 24 * 3600  # seconds after which a temporary file belongs to no living run


def default_folder() -> Path:
    """$DSQ_CACHE, or dsq's folder in the user's cache."""
    told = os.environ.get("DSQ_CACHE")
    if told:
        return Path(told)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dsq"


@dataclass(frozen=True)
class Shape:
    """What an entry holds: `windows` records of `rows` predictions over `n_vocab` tokens."""

    windows: int
    rows: int
    n_vocab: int

    @property
    def record_bytes(self) -> int:
        # checksum and padding, three 4-byte columns, the codes; whole 8-byte words
        return 8 + 12 * self.rows + -(-2 * self.rows * self.n_vocab // 8) * 8

    @property
    def file_bytes(self) -> int:
        return _HEADER.size + self.windows * self.record_bytes


class CorruptEntry(Exception):
    """A record does not match its checksum; the entry has been removed."""


class ReferenceCache:
    """Entries under `folder`, at most `limit` bytes together."""

    def __init__(self, folder: Path | None = None, limit: int = DEFAULT_LIMIT) -> None:
        self.folder = default_folder() if folder is None else Path(folder)
        self.limit = limit

    def accepts(self, shape: Shape) -> bool:
        """Whether an entry of that shape fits the bound, and the folder can be written."""
        return shape.file_bytes <= self.limit and self._writable()

    def _writable(self) -> bool:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return False
        return os.access(self.folder, os.W_OK)

    def open(self, key: str, shape: Shape) -> StoredReference | None:
        """The entry, marked as just used; None when there is none (any more)."""
        path = self._path(key)
        try:
            with path.open("rb") as file:
                header = file.read(_HEADER.size)
            whole = path.stat().st_size == shape.file_bytes
            if not whole or header != _header(shape):
                path.unlink()
                return None
            os.utime(path)
            return StoredReference(path, shape)
        except OSError:  # absent, or unreadable: either way it is computed anew
            return None

    @contextmanager
    def writer(self, key: str, shape: Shape) -> Iterator[ReferenceWriter]:
        """Write an entry; it appears only when the block ends well and every window came."""
        temporary = self.folder / f"{key}.{secrets.token_hex(4)}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(shape.file_bytes)
            with temporary.open("wb") as file:
                file.write(_header(shape))
                yield ReferenceWriter(file)
            if temporary.stat().st_size != shape.file_bytes:
                raise ValueError("the entry is incomplete")
            temporary.replace(self._path(key))
        except OSError as error:
            raise DsqError(
                f"{self.folder}: the reference cache cannot be written ({error.strerror}); "
                "set DSQ_CACHE to another folder, or go without a cache"
            ) from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / (key + _SUFFIX)

    def _make_room(self, n_bytes: int) -> None:
        for leftover in self.folder.glob("*.tmp"):
            with suppress(OSError):
                if time.time() - leftover.stat().st_mtime > _STALE:
                    leftover.unlink()
        entries = [(p.stat().st_mtime_ns, p.stat().st_size, p) for p in self._entries()]
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total + n_bytes <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= size

    def _entries(self) -> list[Path]:
        return list(self.folder.glob("*" + _SUFFIX))


class ReferenceWriter:
    """Appends one window at a time."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def append(self, rows: PackedRows) -> None:
        n, n_vocab = rows.codes.shape
        body = [np.ascontiguousarray(a) for a in (rows.scale, rows.nll, rows.top, rows.codes)]
        self._file.write(struct.pack("<2I", _checksum(*body), 0))
        for array in body:
            self._file.write(array.data)
        self._file.write(b"\0" * (-2 * n * n_vocab % 8))


class StoredReference:
    """An entry, mapped: a window's rows are read when asked for."""

    def __init__(self, path: Path, shape: Shape) -> None:
        self.path = path
        self._shape = shape
        self._bytes = np.memmap(path, np.uint8, "r")

    def window(self, i: int) -> PackedRows:
        """The rows of window i; raises CorruptEntry (and removes the file) on a bad checksum."""
        s = self._shape
        start = _HEADER.size + i * s.record_bytes
        record = self._bytes[start : start + s.record_bytes]
        stored = int(record[:4].view("<u4")[0])
        columns = record[8 : 8 + 12 * s.rows]
        scale, nll = columns[: 8 * s.rows].view("<f4").reshape(2, s.rows)
        top = columns[8 * s.rows :].view("<i4")
        codes = record[8 + 12 * s.rows :].view("<u2")[: s.rows * s.n_vocab]
        rows = PackedRows(codes.reshape(s.rows, s.n_vocab), scale, nll, top)
        if _checksum(scale, nll, top, codes) != stored:
            self.path.unlink(missing_ok=True)
            raise CorruptEntry(str(self.path))
        return rows


def _checksum(*arrays: npt.NDArray[np.generic]) -> int:
    """Adler-32: three times as fast as CRC-32, and disks do not forge checksums."""
    value = 1
    for array in arrays:
        value = zlib.adler32(array.data, value)
    return value


def _header(shape: Shape) -> bytes:
    return _HEADER.pack(_MAGIC, _VERSION, shape.windows, shape.rows, shape.n_vocab)


def file_identity(paths: list[Path]) -> str:
    """Tells files apart without reading them whole: name, size, time of change, first MiB."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        state = path.stat()
        digest.update(f"{path.name}\0{state.st_size}\0{state.st_mtime_ns}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
    return digest.hexdigest()
