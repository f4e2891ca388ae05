"""Writing GGUF files: headers by the `gguf` package, tensor data slab by slab.

The layout (names, types, offsets, shards) is fixed before a byte of tensor data is written, so
the bytes written are the artifact's size, and memory holds one slab.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsq.convert.atomic import atomic_files, start_writeback
from dsq.convert.gguf.metadata import ARCH, ARRAY, I32, STRING, U16, KeyValue
from dsq.quant.scheme import GgmlType
from dsq.quant.stream import Slab

ALIGNMENT = 32


@dataclass(frozen=True)
class OutTensor:
    """A tensor as it will lie in the file; `shape` is row-major."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    n_bytes: int


@dataclass(frozen=True)
class GgufLayout:
    """What a GGUF (or its shards) will hold: decided before anything is written."""

    entries: tuple[KeyValue, ...]
    tensors: tuple[OutTensor, ...]
    shards: tuple[tuple[OutTensor, ...], ...] = field(default=())

    @property
    def data_bytes(self) -> int:
        return sum(padded(t.n_bytes) for t in self.tensors)


def padded(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def gguf_layout(
    entries: Sequence[KeyValue], tensors: Sequence[OutTensor], split_max_bytes: int | None = None
) -> GgufLayout:
    """Cut the tensors into shards of at most `split_max_bytes` (a larger tensor stands alone)."""
    shards: list[list[OutTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if split_max_bytes and shards[-1] and size + tensor.n_bytes > split_max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.n_bytes
    return GgufLayout(tuple(entries), tuple(tensors), tuple(tuple(s) for s in shards))


def shard_paths(path: Path, count: int) -> list[Path]:
    """llama.cpp's names: `model-00001-of-00003.gguf`; one file keeps its own name."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]


def write_gguf(
    path: Path,
    layout: GgufLayout,
    slabs: Iterable[Slab],
    on_bytes: Callable[[int], None] = lambda n: None,
) -> list[Path]:
    """Write `layout` with the data of `slabs` (in layout order); returns the files written.

    Nothing appears under a final name before all of it is complete. `on_bytes` is told the bytes
    of each slab. Raises InputError or DsqError on operating system errors.
    """
    paths = shard_paths(path, len(layout.shards))
    stream = iter(slabs)
    with atomic_files(paths) as temporary:
        # The first slab is asked for first: the threads work while the header is written.
        stream = itertools.chain(list(itertools.islice(stream, 1)), stream)
        for index, (file, tensors) in enumerate(zip(temporary, layout.shards, strict=True)):
            _write_header(file, layout, index, tensors)
            with file.open("ab", buffering=0) as out:
                write_all(out, bytes(padded(out.tell()) - out.tell()))
                for tensor in tensors:
                    _write_tensor(out, tensor, stream, on_bytes)
    return paths


def _write_tensor(
    out: Any, tensor: OutTensor, stream: Any, on_bytes: Callable[[int], None]
) -> None:
    written = 0
    for slab in stream:
        assert slab.job.name == tensor.name, f"{slab.job.name} came where {tensor.name} was due"
        write_all(out, slab.bytes)
        start_writeback(out.fileno())
        written += slab.data.nbytes
        on_bytes(slab.data.nbytes)
        if slab.last:
            break
    assert written == tensor.n_bytes, f"{tensor.name}: {written} bytes, not {tensor.n_bytes}"
    write_all(out, bytes(padded(written) - written))


def write_all(out: Any, data: bytes | memoryview) -> None:
    """write(2) may write less than it was given (2 GiB at most on Linux)."""
    view = memoryview(data)
    while len(view):
        view = view[out.write(view) :]


def _write_header(path: Path, layout: GgufLayout, index: int, tensors: Sequence[OutTensor]) -> None:
    import gguf

    logging.getLogger("gguf").setLevel(logging.ERROR)
    writer = gguf.GGUFWriter(path, ARCH)
    entries = list(layout.entries) if index == 0 else []
    if len(layout.shards) > 1:
        entries += [
            KeyValue("split.no", index, U16),
            KeyValue("split.count", len(layout.shards), U16),
            KeyValue("split.tensors.count", len(layout.tensors), I32),
        ]
    for entry in entries:
        sub = None if entry.element is None else gguf.GGUFValueType(entry.element)
        value = entry.value
        if entry.type == ARRAY and entry.element != STRING and hasattr(value, "tolist"):
            value = value.tolist()
        writer.add_key_value(entry.key, value, gguf.GGUFValueType(entry.type), sub_type=sub)
    for tensor in tensors:
        # The dtype is not used when a raw type is given; f32 keeps the shape as it is.
        import numpy as np

        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),
            tensor.n_bytes,
            raw_dtype=tensor.type.id,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
