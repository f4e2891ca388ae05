"""How tensors lie in safetensors files: shards, headers, the index."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

SHARD_BYTES = 5 << 30  # as transformers cuts
INDEX = "model.safetensors.index.json"
# safetensors' names, as numpy's; bf16 has no dtype there and is given as its bits.
DTYPES = {"I32": "<i4", "I16": "<i2", "F16": "<f2", "BF16": "<u2", "F32": "<f4"}


@dataclass(frozen=True)
class OutTensor:
    """A tensor of a directory: `dtype` is safetensors' (I32, I16, F16, BF16 or F32)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * int(DTYPES[self.dtype][-1])


Shards = Mapping[str, Sequence[OutTensor]]  # by file name


def cut(tensors: Sequence[OutTensor], shard_bytes: int) -> dict[str, list[OutTensor]]:
    """The files in order, each of at most `shard_bytes` unless one tensor has more."""
    groups: list[list[OutTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.n_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.n_bytes
    n = len(groups)
    if n == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05d}-of-{n:05d}.safetensors": g for i, g in enumerate(groups)}


def header(members: Sequence[OutTensor]) -> tuple[bytes, list[int]]:
    """A file's first bytes, a length and padded JSON; and each tensor's offset in the file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts = []
    at = 0
    for tensor in members:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.n_bytes],
        }
        starts.append(at)
        at += tensor.n_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    found = len(text).to_bytes(8, "little") + text
    return found, [len(found) + start for start in starts]


def index(shards: Shards) -> dict[str, Any]:
    """The index file by its name; nothing for one shard."""
    if len(shards) == 1:
        return {}
    total = sum(tensor.n_bytes for members in shards.values() for tensor in members)
    places = {tensor.name: name for name, members in shards.items() for tensor in members}
    return {INDEX: {"metadata": {"total_size": total}, "weight_map": places}}
