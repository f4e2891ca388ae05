"""Block quantization by ggml itself, through the libggml-base that llama-cpp-python installs.

`ggml_quantize_chunk` *is* the reference: what it writes equals llama-quantize's bytes. ctypes
releases the GIL around each call, so plain Python threads keep all cores busy.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsq.errors import DsqError
from dsq.quant.scheme import BF16, F16, F32, GgmlType

F32Array = npt.NDArray[np.float32]
U8Array = npt.NDArray[np.uint8]

_LIBRARY = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


@cache
def library() -> Any:
    """libggml-base, loaded without importing llama_cpp (which takes ten times as long)."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise DsqError("llama-cpp-python is not installed; run: pip install llama-cpp-python")
    path = Path(spec.origin).parent / "lib" / _LIBRARY.get(sys.platform, "libggml-base.so")
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise DsqError(f"cannot load {path}: {error}; reinstall llama-cpp-python") from error
    lib.ggml_quantize_init.argtypes = [ctypes.c_int]
    lib.ggml_quantize_init.restype = None
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    lib.ggml_validate_row_data.restype = ctypes.c_bool
    lib.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    lib.ggml_get_type_traits.argtypes = [ctypes.c_int]
    for name in ("ggml_fp16_to_fp32_row", "ggml_bf16_to_fp32_row"):
        function = getattr(lib, name)
        function.restype = None
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return lib


def quantize(values: F32Array, to: GgmlType, imatrix: F32Array | None = None) -> U8Array:
    """Quantize rows (n_rows, n_per_row) of float32; returns bytes (n_rows, row_bytes).

    `imatrix` holds one weight per input channel (n_per_row). The work is done in the calling
    thread; see `dsq.quant.stream` for many. Source: `ggml_quantize_chunk`.
    """
    n_rows, n_per_row = values.shape
    out = np.empty((n_rows, to.row_bytes(n_per_row)), dtype=np.uint8)
    quantize_into(values, to, out, imatrix)
    return out


def quantize_into(
    values: F32Array, to: GgmlType, out: U8Array, imatrix: F32Array | None = None
) -> None:
    """As `quantize`, into `out`. Both arrays must be C-contiguous."""
    n_rows, n_per_row = values.shape
    if to is F32:
        out[:] = np.ascontiguousarray(values).view(np.uint8)
        return
    assert values.flags.c_contiguous, "rows to quantize must be contiguous"
    assert out.flags.c_contiguous, "the output must be contiguous"
    if imatrix is not None and imatrix.shape != (n_per_row,):
        raise DsqError(f"imatrix of {imatrix.shape} values for rows of {n_per_row}")
    written = library().ggml_quantize_chunk(
        to.id,
        values.ctypes.data,
        out.ctypes.data,
        0,
        n_rows,
        n_per_row,
        None if imatrix is None else imatrix.ctypes.data,
    )
    if written != out.nbytes:
        raise DsqError(f"ggml wrote {written} bytes of {to.name} where {out.nbytes} were expected")


def is_valid(data: U8Array, stored: GgmlType) -> bool:
    """`ggml_validate_row_data`: no NaN or Inf among values or block scales."""
    flat = np.ascontiguousarray(data)
    return bool(library().ggml_validate_row_data(stored.id, flat.ctypes.data, flat.nbytes))


def dequantize(data: U8Array, stored: GgmlType, n_per_row: int) -> F32Array:
    """Stored bytes to float32 rows (n_rows, n_per_row), as ggml's `to_float` does."""
    flat = np.ascontiguousarray(data).reshape(-1)
    n_rows = flat.nbytes // stored.row_bytes(n_per_row)
    out = np.empty((n_rows, n_per_row), dtype=np.float32)
    dequantize_into(flat, stored, out)
    return out


def dequantize_into(flat: U8Array, stored: GgmlType, out: F32Array) -> None:
    """As `dequantize`, into the contiguous `out`."""
    if stored is F32:
        out[:] = flat.view(np.float32).reshape(out.shape)
        return
    lib = library()
    if stored is BF16:
        lib.ggml_bf16_to_fp32_row(flat.ctypes.data, out.ctypes.data, out.size)
    elif stored is F16:
        lib.ggml_fp16_to_fp32_row(flat.ctypes.data, out.ctypes.data, out.size)
    else:
        lib.ggml_quantize_init(stored.id)  # the iq types need their grids
        to_float = lib.ggml_get_type_traits(stored.id).contents.to_float
        if not to_float:
            raise DsqError(f"ggml cannot dequantize {stored.name}")
        to_float(flat.ctypes.data, out.ctypes.data, out.size)
