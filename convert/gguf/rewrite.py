"""A GGUF with other metadata and the same tensors: the data is copied by the kernel, not read.

The header is encoded here, not by the `gguf` package, because nothing else may change: not the
alignment, not the order of keys, not an empty array. That the encoding loses nothing is shown on
the file itself: its own header, encoded again, must be the bytes that it begins with.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dsq.convert.atomic import atomic_files, check_target, start_writeback
from dsq.convert.gguf.header import ARRAY, BOOL, SCALARS, STRING, read_header
from dsq.convert.gguf.metadata import KeyValue
from dsq.convert.gguf.reader import GgufFile
from dsq.convert.gguf.writer import shard_paths
from dsq.convert.tensors import TensorInfo
from dsq.errors import DsqError, InputError

_CHUNK = 1 << 27  # what the disk gets to write while the next is copied


@dataclass(frozen=True)
class _Copy:
    """One output file: a new header (or none), then the source from `start` on."""

    source: Path
    out: Path
    header: bytes
    start: int
    n_bytes: int


def rewrite_gguf(
    gguf: GgufFile,
    entries: Sequence[KeyValue],
    out: Path,
    *,
    force: bool = False,
    on_bytes: Callable[[int], None] = lambda n: None,
) -> list[Path]:
    """Write `gguf` to `out` with the metadata `entries`; returns the files written.

    The first shard's header is new, the tensor data and all other shards are copied. Nothing
    appears under a final name before all of it is written and its header read again. Raises
    InputError where `out` is one of the sources, exists (unless `force`) or has no room.
    """
    out = Path(out)
    outs = [out] if len(gguf.shards) == 1 else _shard_outs(out, len(gguf.shards))
    copies = _plan(gguf, entries, outs)
    for copy in copies:
        for source in gguf.shards:
            if _same_file(copy.out, source):
                raise InputError(
                    f"{copy.out} is the file to be mended, {source}; it is never written to: give "
                    "another name"
                )
    total = sum(len(copy.header) + copy.n_bytes for copy in copies)
    for copy in copies:
        check_target(copy.out, force=force, n_bytes=total)
    with atomic_files(outs) as temporary:
        for copy, path in zip(copies, temporary, strict=True):
            with open(copy.source, "rb") as reader, open(path, "wb", buffering=0) as writer:
                _write(writer.fileno(), copy.header)
                copy_bytes(reader.fileno(), writer.fileno(), copy.start, copy.n_bytes, on_bytes)
            _verify(copy, entries if copy.header else None, path)
    return outs


def data_bytes(gguf: GgufFile) -> int:
    """About how much `rewrite_gguf` copies, for a progress bar."""
    return sum(path.stat().st_size for path in gguf.shards)


def _shard_outs(out: Path, count: int) -> list[Path]:
    """`out` may be the plain name or the first shard's own."""
    suffix = f"-00001-of-{count:05d}"
    stem = out.stem.removesuffix(suffix)
    return shard_paths(out.with_name(f"{stem}.gguf"), count)


def _same_file(a: Path, b: Path) -> bool:
    """Also through links, hard and symbolic."""
    return a.exists() and a.samefile(b)


def _plan(gguf: GgufFile, entries: Sequence[KeyValue], outs: Sequence[Path]) -> list[_Copy]:
    own = [KeyValue(key, value, *gguf.metadata_types[key]) for key, value in gguf.metadata.items()]
    sizes = [path.stat().st_size for path in gguf.shards]
    infos = [info for info in gguf.tensors.values() if info.path == gguf.path]
    # The tensor list depends on where the data begins, but its length does not.
    start = _padded(len(encode_header(gguf.version, own, infos, 0)), gguf.alignment)
    with open(gguf.path, "rb") as file:
        before = encode_header(gguf.version, own, infos, start)
        if file.read(len(before)) != before:
            raise DsqError(
                f"{gguf.path}: the header has values that dsq cannot copy exactly (a bool that is "
                "neither 0 nor 1?); convert the model again"
            )
    # A file without tensors may end with its header, unpadded.
    n_data = max(0, sizes[0] - start)
    header = encode_header(gguf.version, entries, infos, start)
    if sizes[0] >= start:
        header += bytes(_padded(len(header), gguf.alignment) - len(header))
    copies = [_Copy(gguf.path, outs[0], header, start, n_data)]
    for path, out, size in zip(gguf.shards[1:], outs[1:], sizes[1:], strict=True):
        copies.append(_Copy(path, out, b"", 0, size))
    return copies


def encode_header(
    version: int, entries: Sequence[KeyValue], tensors: Sequence[TensorInfo], start: int
) -> bytes:
    """A header without its padding; `start` is where the tensors' data section begins."""
    parts = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(entries))]
    for entry in entries:
        parts += [_string(entry.key), struct.pack("<I", entry.type), _value(entry)]
    for info in tensors:
        ne = tuple(reversed(info.shape))
        parts += [
            _string(info.name),
            struct.pack(f"<I{len(ne)}Q", len(ne), *ne),
            struct.pack("<Iq", info.type.id, info.offset - start),
        ]
    return b"".join(parts)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(entry: KeyValue) -> bytes:
    if entry.type == STRING:
        return _string(entry.value)
    if entry.type != ARRAY:
        return _scalars([entry.value], entry.type)
    assert entry.element is not None, f"{entry.key} is an array of nothing"
    head = struct.pack("<IQ", entry.element, len(entry.value))
    if entry.element == STRING:
        return head + b"".join(map(_string, entry.value))
    return head + _scalars(entry.value, entry.element)


def _scalars(values: Any, type_id: int) -> bytes:
    if type_id == BOOL:
        return np.asarray(values, bool).tobytes()
    return np.asarray(values, SCALARS[type_id]).tobytes()


def _padded(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while len(view):
        view = view[os.write(descriptor, view) :]


# The file systems, kernels or kinds of file differ: the next way may do it.
_NOT_THIS_WAY = frozenset(
    (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)
)


def copy_bytes(
    source: int, target: int, start: int, n_bytes: int, on_bytes: Callable[[int], None]
) -> None:
    """Append `n_bytes` of the file `source`, from `start` on, to the file `target`.

    On Linux inside the kernel: copy_file_range, or sendfile where that cannot. Elsewhere, and
    where neither can, by reading and writing. Raises InputError where the source ends early.
    """
    ways = [_by_kernel, _by_sendfile] if sys.platform == "linux" else []
    end = start + n_bytes
    while start < end:
        way = ways[0] if ways else _by_hand
        try:
            done = way(source, target, start, min(_CHUNK, end - start))
        except OSError as error:
            if not ways or error.errno not in _NOT_THIS_WAY:
                raise
            ways.pop(0)
            continue
        if done == 0:
            if ways:  # some file systems say 0 where they mean no
                ways.pop(0)
                continue
            raise InputError("the source file shrank while it was copied; start again")
        start += done
        start_writeback(target)
        on_bytes(done)


def _by_kernel(source: int, target: int, start: int, n: int) -> int:
    return os.copy_file_range(source, target, n, offset_src=start)


def _by_sendfile(source: int, target: int, start: int, n: int) -> int:
    return os.sendfile(target, source, start, n)


def _by_hand(source: int, target: int, start: int, n: int) -> int:
    data = os.pread(source, min(n, 1 << 24), start)
    _write(target, data)
    return len(data)


def _verify(copy: _Copy, entries: Sequence[KeyValue] | None, path: Path) -> None:
    """The new file, read again: the metadata asked for, the tensors where they were."""
    before, after = read_header(copy.source), read_header(path)
    wanted = before.metadata_types
    if entries is not None:
        wanted = {entry.key: (entry.type, entry.element) for entry in entries}
    if (
        path.stat().st_size != len(copy.header) + copy.n_bytes
        or _placed(after.tensors) != _placed(before.tensors)
        or after.alignment != before.alignment
        or list(after.metadata_types.items()) != list(wanted.items())
    ):
        raise DsqError(f"{copy.out}: the copy of {copy.source} did not arrive whole; try again")


def _placed(tensors: dict[str, TensorInfo]) -> list[TensorInfo]:
    """The tensors in their order, offsets counted from the first byte of data."""
    first = min((info.offset for info in tensors.values()), default=0)
    return [replace(t, path=Path(), offset=t.offset - first) for t in tensors.values()]
