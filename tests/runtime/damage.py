"""Artifacts with one mistake in them, as converters make it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsq.convert.gguf.metadata import KeyValue
from dsq.convert.gguf.reader import read_gguf
from dsq.convert.gguf.writer import OutTensor, gguf_layout, write_gguf
from dsq.quant.stream import Job, Slab

Rows = np.ndarray


def rewrite(
    path: Path,
    out: Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Callable[[Rows], Rows]] | None = None,
    renamed: Mapping[str, str] | None = None,
) -> Path:
    """Copy a GGUF with other metadata (None drops a key), other rows of stored bytes, other names.

    A tensor renamed to "" is left out.
    """
    gguf, metadata, tensors = read_gguf(path), metadata or {}, tensors or {}
    renamed = renamed or {}
    entries = [
        KeyValue(key, metadata.get(key, value), *gguf.metadata_types[key])
        for key, value in gguf.metadata.items()
        if metadata.get(key, value) is not None and key != "general.architecture"
    ]
    layout, slabs = [], []
    for name, info in gguf.tensors.items():
        if renamed.get(name) == "":
            continue
        rows = gguf.data(name).reshape(-1, info.type.row_bytes(info.n_per_row))
        rows = np.ascontiguousarray(tensors.get(name, lambda r: r)(rows.copy()))
        new = renamed.get(name, name)
        layout.append(OutTensor(new, info.shape, info.type, rows.nbytes))
        slabs.append(Slab(Job(new, rows, info.type, info.type, info.n_per_row), rows, True))
    write_gguf(out, gguf_layout(entries, layout), slabs)
    return out


def swapped(a: int, b: int, n: int = 1) -> Callable[[Rows], Rows]:
    """Exchange rows a … a+n-1 with b … b+n-1."""

    def change(rows: Rows) -> Rows:
        rows[[*range(a, a + n), *range(b, b + n)]] = rows[[*range(b, b + n), *range(a, a + n)]]
        return rows

    return change


def taken(order: np.ndarray) -> Callable[[Rows], Rows]:
    return lambda rows: rows[order]
