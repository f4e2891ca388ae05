"""Writing llama.cpp's importance matrices, and merging them. Source: `save_imatrix` and
`load_imatrix` in tools/imatrix/imatrix.cpp."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsq.convert.atomic import atomic_files, check_target
from dsq.convert.imatrix import F32Array, ImatrixSums
from dsq.errors import InputError


def write_imatrix(path: Path, imatrix: ImatrixSums, *, force: bool = False) -> None:
    """Write the GGUF that llama-imatrix would write for the same sums, byte for byte.

    Raises InputError for an output that exists, and as `atomic_files` does.
    """
    import gguf

    check_target(path, force=force)
    logging.getLogger("gguf").setLevel(logging.ERROR)
    with atomic_files([path]) as (temporary,):
        writer = gguf.GGUFWriter(temporary, "")  # no architecture: it is of no model
        writer.add_string("general.type", "imatrix")
        writer.add_array("imatrix.datasets", list(imatrix.datasets))
        writer.add_uint32("imatrix.chunk_count", imatrix.n_chunks)
        writer.add_uint32("imatrix.chunk_size", imatrix.chunk_size)
        for name in sorted(imatrix.sums):
            sums, counts = imatrix.sums[name], imatrix.counts[name]
            if len(counts) > 1:  # ggml leaves out axes of one
                sums, counts = sums.reshape(len(counts), -1), counts.reshape(-1, 1)
            writer.add_tensor(f"{name}.in_sum2", sums)
            writer.add_tensor(f"{name}.counts", counts)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def merge(parts: Sequence[ImatrixSums]) -> ImatrixSums:
    """As if all had been one text: sums and counts added, a tensor of one part kept as it is.

    The chunk size is the first one's, and the chunks are counted in it, as llama-imatrix does.
    Raises InputError for parts whose shapes differ.
    """
    first = parts[0]
    sums: dict[str, F32Array] = {}
    counts: dict[str, F32Array] = {}
    for part in parts:
        for name in part.sums:
            if name not in sums:
                sums[name], counts[name] = part.sums[name], part.counts[name]
                continue
            for mine, other in ((sums, part.sums), (counts, part.counts)):
                if mine[name].shape != other[name].shape:
                    raise InputError(
                        f"{part.path}: {name} has {other[name].size} values where {first.path} "
                        f"has {mine[name].size}; only matrices of one model can be merged"
                    )
                mine[name] = mine[name] + other[name]
    most = max(int(values.max()) for values in counts.values())
    return ImatrixSums(
        first.path,
        sums,
        counts,
        datasets=tuple(name for part in parts for name in part.datasets),
        n_chunks=most // max(first.chunk_size, 1),
        chunk_size=first.chunk_size,
    )


def summary(imatrix: ImatrixSums) -> list[dict[str, object]]:
    """A row a tensor: tokens seen, sum of the mean squares, share of the largest channel."""
    means = imatrix.means().values
    rows: list[dict[str, object]] = []
    for name in sorted(means, key=_natural):
        total = float(means[name].sum(dtype=np.float64))
        rows.append(
            {
                "tensor": name,
                "n_channels": means[name].size,
                "count": int(imatrix.counts[name].max()),
                "total": total,
                "largest_share": float(means[name].max()) / total if total > 0 else 0.0,
            }
        )
    return rows


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """`blk.2` before `blk.10`."""
    return [
        (word.isdecimal(), int(word) if word.isdecimal() else 0, word) for word in name.split(".")
    ]
