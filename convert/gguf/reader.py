"""Opens a GGUF model, in one file or split into shards."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsq.convert.gguf.header import Header, read_header
from dsq.convert.mapped import MappedFiles
from dsq.convert.tensors import TensorInfo
from dsq.errors import InputError

_SHARD_NAME = re.compile(r"(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, eq=False)
class GgufFile:
    """One model: the metadata of its first shard, and the tensors of all of them.

    `metadata` holds Python numbers, bools and str; arrays of str as list, arrays of numbers as
    numpy arrays. `metadata_types` keeps each key's GGUF type id, and for an array its elements'
    type id, so that a writer can copy a key as it was (all but `split.*`, which tell of shards).
    Tensor offsets count from the start of their file; `alignment` is the first shard's.
    """

    path: Path
    shards: tuple[Path, ...]
    version: int
    alignment: int
    metadata: dict[str, Any]
    metadata_types: dict[str, tuple[int, int | None]]
    tensors: dict[str, TensorInfo]
    _files: MappedFiles = field(default_factory=MappedFiles, repr=False)

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes, shape (n_bytes,): a read-only view of the file, nothing is copied."""
        info = self.tensors.get(name)
        if info is None:
            raise InputError(f"{self.path}: there is no tensor {name!r}")
        return self._files.view(info)


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file, or of all files of a split one given its first.

    Raises InputError when the file is not what it claims, UnsupportedError for version 1,
    big-endian files and tensor types that dsq does not know.
    """
    path = Path(path)
    first = read_header(path)
    count = _integer(path, first, "split.count", 1)
    shards: tuple[Path, ...] = (path,)
    tensors = first.tensors
    if count > 1:
        shards = _shard_paths(path, _integer(path, first, "split.no", 0), count)
        tensors = _all_tensors(shards, first)
    return GgufFile(
        path=path,
        shards=shards,
        version=first.version,
        alignment=first.alignment,
        metadata=first.metadata,
        metadata_types=first.metadata_types,
        tensors=tensors,
    )


def _shard_paths(path: Path, number: int, count: int) -> tuple[Path, ...]:
    """The files of a split model, found by name as llama.cpp does."""
    name = _SHARD_NAME.fullmatch(path.name)
    if number != 0:
        first = f"{name['stem']}-00001-of-{count:05d}.gguf" if name else "the first shard"
        raise InputError(
            f"{path}: this is shard {number + 1} of {count} of a split model; give {first}"
        )
    if name is None or int(name["no"]) != 1 or int(name["count"]) != count:
        raise InputError(
            f"{path}: this is the first of {count} shards, so its name must end in "
            f"-00001-of-{count:05d}.gguf; rename it, the other shards are found by name"
        )
    names = [f"{name['stem']}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]
    return (path, *(path.with_name(n) for n in names[1:]))


def _all_tensors(shards: tuple[Path, ...], first: Header) -> dict[str, TensorInfo]:
    """The tensors of all shards together, after checking that the shards belong together."""
    path, count = shards[0], len(shards)
    tensors = dict(first.tensors)
    for i, shard in enumerate(shards[1:], 1):
        if not shard.exists():
            raise InputError(
                f"{shard}: missing: it is shard {i + 1} of {count} of {path.name}; "
                f"put all shards into one directory"
            )
        part = read_header(shard)
        number = _integer(shard, part, "split.no", -1), _integer(shard, part, "split.count", -1)
        if number != (i, count):
            raise InputError(
                f"{shard}: split.no and split.count are {number[0]} and {number[1]}, expected "
                f"{i} and {count}; the shard belongs to another model"
            )
        for name, info in part.tensors.items():
            if name in tensors:
                raise InputError(
                    f"{shard}: tensor {name!r} is in {tensors[name].path.name} as well"
                )
            tensors[name] = info
    total = _integer(path, first, "split.tensors.count", len(tensors))
    if total != len(tensors):
        raise InputError(
            f"{path}: split.tensors.count is {total} but the {count} shards hold {len(tensors)} "
            f"tensors; a shard belongs to another model"
        )
    return tensors


def _integer(path: Path, header: Header, key: str, default: int) -> int:
    value = header.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{path}: {key} is {value!r}; expected an integer")
    return value
