"""Hidden states at the border between two layers, on disk: one batch of windows in memory.

The page cache is the RAM that they take: the kernel keeps what it has room for and writes the rest
back, so a small text costs no disk reads and a large one no memory.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsq.quant.fileio import read_at, reserve, write_at

if TYPE_CHECKING:
    from torch import Tensor


class Border(AbstractContextManager["Border"]):
    """A file of (windows, n_ctx, n_embd) float32, open until its `with` ends. Raises OSError."""

    def __init__(self, path: Path, shape: tuple[int, int, int], *, create: bool = False) -> None:
        self.path, self.shape = path, shape
        self._window_bytes = 4 * shape[1] * shape[2]
        self._file = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_TRUNC if create else 0), 0o666)
        if create:
            try:
                reserve(self._file, shape[0] * self._window_bytes)
            except BaseException:
                os.close(self._file)
                raise

    def read(self, start: int, n: int) -> Tensor:
        """Windows start … start + n - 1: (n, n_ctx, n_embd), on the CPU."""
        import torch

        values = torch.empty((n, *self.shape[1:]))
        read_at(self._file, _bytes(values), start * self._window_bytes)
        return values

    def write(self, start: int, values: Tensor) -> None:
        write_at(self._file, _bytes(values.detach().cpu()), start * self._window_bytes)

    def sync(self) -> None:
        """What was written so far survives a power cut."""
        os.fsync(self._file)

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def _bytes(values: Tensor) -> memoryview:
    return values.contiguous().numpy().reshape(-1).view(np.uint8).data
