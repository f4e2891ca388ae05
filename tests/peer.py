"""llama.cpp itself, as installed: `llama_model_quantize` *is* llama-quantize."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

_lines: list[str] = []


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, data: Any) -> None:
    _lines.append(text.decode(errors="replace"))


def llama_quantize(
    source: Path,
    out: Path,
    ftype: int,
    *,
    imatrix: Mapping[str, np.ndarray] | None = None,
    **flags: Any,
) -> str | None:
    """Run llama-quantize; returns None, or its log when it refused."""
    code, log = llama_quantize_log(source, out, ftype, imatrix=imatrix, **flags)
    return None if code == 0 else log


def llama_quantize_log(
    source: Path,
    out: Path,
    ftype: int,
    *,
    imatrix: Mapping[str, np.ndarray] | None = None,
    **flags: Any,
) -> tuple[int, str]:
    """Run llama-quantize; returns its exit code and its log."""
    llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))
    _lines.clear()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = ftype
    params.nthread = 2
    keep: list[Any] = []
    if imatrix is not None:
        entries = (llama_cpp.llama_model_imatrix_data * (len(imatrix) + 1))()
        for entry, (name, values) in zip(entries, imatrix.items(), strict=False):
            data = np.ascontiguousarray(values, dtype=np.float32)
            text = name.encode()
            keep += [data, text]
            entry.name = text
            entry.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = data.size
        params.imatrix = entries
        keep.append(entries)
    overrides = flags.pop("tt_overrides", None)
    if overrides:
        array = (llama_cpp.llama_model_tensor_override * (len(overrides) + 1))()
        for item, (pattern, type_id) in zip(array, overrides, strict=False):
            item.pattern, item.type = pattern.encode(), type_id
        array[len(overrides)].type = 43
        params.tt_overrides = array
        keep.append(array)
    for name, value in flags.items():
        setattr(params, name, value)
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), params)
    return code, "".join(_lines)
