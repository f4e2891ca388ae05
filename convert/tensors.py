"""TensorInfo: where a stored tensor lies, before a byte of it is read."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from dsq.quant.scheme import GgmlType


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file: `shape` is row-major (the last axis is contiguous)."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    path: Path
    offset: int
    n_bytes: int

    @property
    def n_elements(self) -> int:
        return prod(self.shape)

    @property
    def n_per_row(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def n_rows(self) -> int:
        return self.n_elements // self.n_per_row if self.n_per_row else 0
