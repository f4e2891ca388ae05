"""Reads the header of a safetensors file: which tensors it holds, and where.

A reader of our own, so that looking at a checkpoint imports neither safetensors nor torch. It
makes the checks of upstream's `Metadata::validate` (safetensors/src/tensor.rs): tensors cover the
data section without hole or overlap, and their sizes agree with shape and dtype.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from dsq.convert.json_file import parse_object, shown
from dsq.convert.names import is_ignored
from dsq.convert.tensors import TensorInfo
from dsq.errors import InputError, UnsupportedError
from dsq.quant.scheme import BY_NAME, GgmlType

MAX_HEADER_BYTES = 100_000_000  # upstream's MAX_HEADER_SIZE
MAX_DIMS = 8

_FLOATS: dict[str, GgmlType] = {
    "F32": BY_NAME["f32"],
    "F16": BY_NAME["f16"],
    "BF16": BY_NAME["bf16"],
}
# Packed weights (GPTQ, EXL2) are integers; a plain checkpoint has no use for them.
_INTEGERS: dict[str, GgmlType] = {
    "I8": BY_NAME["i8"],
    "I16": BY_NAME["i16"],
    "I32": BY_NAME["i32"],
    "I64": BY_NAME["i64"],
}


def read_header(path: Path, *, integers: bool = False) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, in the header's order; offsets from the file's start.

    Tensors of other types than F32, F16, BF16 (and, if asked, integers) raise UnsupportedError,
    unless they are buffers that nobody needs: those are left out. A file that is damaged or is
    not safetensors raises InputError.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            if size < 8 or n_header > size - 8:
                raise InputError(
                    f"{path}: not a safetensors file, or truncated: the header claims {n_header} "
                    f"bytes but the file has {size}; download it again"
                )
            if n_header > MAX_HEADER_BYTES:
                raise InputError(
                    f"{path}: the header has {n_header} bytes; the limit is {MAX_HEADER_BYTES}"
                )
            raw = file.read(n_header)
    except OSError as error:
        raise InputError(f"{path}: cannot read the file: {error.strerror or error}") from error
    header = _parse(path, raw)
    return _tensors(path, header, 8 + n_header, size, _FLOATS | (_INTEGERS if integers else {}))


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    # Python's parser would skip leading spaces, which the format forbids
    if not raw.startswith(b"{"):
        raise InputError(f"{path}: not a safetensors file (its header is no JSON object)")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: the header is not UTF-8 (byte {error.start})") from None
    return parse_object(text, f"{path}: the header")


def _tensors(
    path: Path, header: dict[str, Any], start: int, size: int, types: dict[str, GgmlType]
) -> dict[str, TensorInfo]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{path}: __metadata__ in the header is no object of strings")
    found: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        what = f"{path}: tensor {shown(name)}"
        dtype, shape, (begin, end) = _entry(what, entry)
        spans.append((begin, end, name))
        type = types.get(dtype)
        if type is None:
            if is_ignored(name):
                continue
            raise UnsupportedError(
                f"{what} is of type {shown(dtype)}, which is not supported "
                f"(supported: {', '.join(types)})"
            )
        n_bytes = prod(shape) * type.block_bytes
        if end - begin != n_bytes:
            raise InputError(
                f"{what}: {dtype} of shape {list(shape)} takes {_short(n_bytes)} bytes but its "
                f"data_offsets span {_short(end - begin)}"
            )
        found[name] = TensorInfo(name, shape, type, path, start + begin, n_bytes)
    _check_cover(path, spans, size - start)
    return found


def _entry(what: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    if not isinstance(entry, dict):
        raise InputError(f"{what}: its header entry is no object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str):
        raise InputError(f"{what}: dtype is missing or no string")
    if not _naturals(shape) or len(shape) > MAX_DIMS:
        raise InputError(f"{what}: shape is missing or no list of up to {MAX_DIMS} natural numbers")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{what}: data_offsets is missing or no [begin, end] with begin <= end")
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_cover(path: Path, spans: list[tuple[int, int, str]], n_data: int) -> None:
    """The tensors must fill the data section exactly: else the header belongs to another file."""
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            wrong = "overlaps the tensor before it" if begin < at else "leaves a hole before it"
            raise InputError(f"{path}: tensor {shown(name)} {wrong} (it begins at {_short(begin)})")
        if end > n_data:
            raise InputError(
                f"{path}: tensor {shown(name)} ends at byte {_short(end)} of the data but the file "
                f"has {n_data}; the file is truncated, download it again"
            )
        at = end
    if at != n_data:
        raise InputError(
            f"{path}: {n_data - at} bytes follow the last tensor; the file is damaged, "
            f"download it again"
        )


def _short(number: int) -> str:
    """A number from the file for a message: Python refuses to print one of 5000 digits."""
    return str(number) if abs(number) < 1 << 64 else "more than 2^64"
