"""Tensor bytes as views of memory-mapped files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from dsq.convert.tensors import TensorInfo
from dsq.errors import InputError


class MappedFiles:
    """Maps each file once, when its first tensor is asked for."""

    def __init__(self) -> None:
        self._maps: dict[Path, npt.NDArray[np.uint8]] = {}

    def view(self, info: TensorInfo) -> npt.NDArray[np.uint8]:
        """The tensor's bytes, shape (n_bytes,), read-only; nothing is read or copied yet."""
        mapped = self._maps.get(info.path)
        if mapped is None:
            try:
                mapped = np.asarray(np.memmap(info.path, dtype=np.uint8, mode="r"))
            except (OSError, ValueError) as error:  # ValueError: the file is empty by now
                raise InputError(f"{info.path}: cannot map the file: {error}") from error
            self._maps[info.path] = mapped
        data = mapped[info.offset : info.offset + info.n_bytes]
        if data.size != info.n_bytes:
            raise InputError(f"{info.path}: the file shrank after its header was read; start again")
        return data
