"""Quantized Hugging Face directories (GPTQ, EXL2): a matrix lies in several packed tensors.

Readers find a checkpoint of dense float32 tensors under their usual names; one at a time is
unpacked when it is asked for.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsq.convert.json_file import shown
from dsq.convert.tensors import TensorInfo
from dsq.convert.weight_files import Read
from dsq.errors import InputError
from dsq.quant.exl2_layout import Exl2Tensor
from dsq.quant.gptq_layout import GptqTensor
from dsq.quant.scheme import BF16, F32, GgmlType

Codes = GptqTensor | Exl2Tensor
Parts = Mapping[str, TensorInfo]  # a linear's tensors by the last piece of their names

_DTYPES = {"f32": "<f4", "f16": "<f2", "i16": "<i2", "i32": "<i4"}


@dataclass(frozen=True)
class PackedRun:
    """Consecutive rows of codes of one width, and the rows of words that they are in."""

    rows: slice
    bits: int
    words: slice


@dataclass(frozen=True, eq=False)
class Layout:
    """How the codes of a matrix lie in its words.

    `groups` (n_in,): the group of each row of codes. `order` (n_in,): the input of each; None when
    they are in order.
    """

    runs: Sequence[PackedRun]
    groups: npt.NDArray[np.integer[Any]]
    order: npt.NDArray[np.intp] | None


class PackedLinears(ABC):
    """The packed linears of one directory, each with the module name that it has there.

    `tensors` are the matrices as they seem to be: `MODULE.weight`, float32, (n_out, n_in).
    """

    method: str  # as in config.json: quant_method

    def __init__(
        self,
        path: Path,
        modules: Mapping[str, Parts],
        shapes: Mapping[str, tuple[int, int]],
        read: Read,
    ) -> None:
        self._path, self._modules, self._read = path, modules, read
        self._lock = threading.Lock()
        self._last: tuple[str, npt.NDArray[np.uint8]] | None = None
        self.tensors: dict[str, TensorInfo] = {}
        for module, (n_out, n_in) in shapes.items():
            name, first = f"{module}.weight", next(iter(modules[module].values()))
            self.tensors[name] = TensorInfo(
                name, (n_out, n_in), F32, first.path, first.offset, 4 * n_out * n_in
            )

    @abstractmethod
    def codes(self, name: str) -> Codes:
        """The matrix `name` ("….weight") as codes. Raises InputError for damaged contents."""

    @abstractmethod
    def layout(self, name: str) -> Layout:
        """Where the codes are. Raises InputError for damaged contents."""

    @abstractmethod
    def contents(
        self, name: str
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any], npt.NDArray[Any]]:
        """The words (rows, n_out or more), as they lie in the file; zero points and scales,
        (n_groups, n_out). A weight is (code - zero) * scale."""

    @abstractmethod
    def kind(self, name: str) -> str:
        """What the matrix is stored as, for people: "gptq 4-bit"."""

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The dequantized float32 bytes, shape (n_bytes,). The last tensor is kept."""
        with self._lock:
            if self._last is None or self._last[0] != name:
                self._last = None  # its memory is free before the next is made
                self._last = name, self.codes(name).dequantized().reshape(-1).view(np.uint8)
            return self._last[1]

    def stored_bytes(self, name: str) -> int:
        """What the matrix takes in the files."""
        return sum(info.n_bytes for info in self._modules[name.removesuffix(".weight")].values())

    @property
    def files(self) -> set[Path]:
        return {info.path for parts in self._modules.values() for info in parts.values()}

    def read_part(self, name: str, part: str) -> npt.NDArray[Any]:
        """One packed tensor of the matrix `name`, in its own type; bf16 widened to float32."""
        info = self._modules[name.removesuffix(".weight")][part]
        raw = self._read(info)
        if info.type is BF16:
            wide = raw.view("<u2").astype(np.uint32) << np.uint32(16)
            return wide.view(np.float32).reshape(info.shape)
        return np.require(raw.view(_DTYPES[info.type.name]).reshape(info.shape), requirements="A")

    def read_parts(self, name: str, parts: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        return {part: self.read_part(name, part) for part in parts}

    def release(self, name: str) -> None:
        """Let go of the pages that the matrix was read from."""
        from dsq.convert.verify_tensors import release  # which imports checkpoints

        for info in self._modules[name.removesuffix(".weight")].values():
            release(self._read(info))

    def damaged(self, name: str, error: InputError) -> InputError:
        """The same error, saying where."""
        return InputError(f"{self._path}: {name.removesuffix('.weight')}: {error}")


def split_parts(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    required: Sequence[str],
    optional: Sequence[str] = (),
) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo]]:
    """Packed linears by module name, and the tensors that are no part of one.

    Raises InputError for a linear that lacks a tensor, or is there packed and dense.
    """
    modules: dict[str, dict[str, TensorInfo]] = {}
    dense: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        module, _, part = name.rpartition(".")
        if part in required or part in optional:
            modules.setdefault(module, {})[part] = info
        else:
            dense[name] = info
    for module, parts in modules.items():
        for part in required:
            if part not in parts:
                raise InputError(
                    f"{path}: tensor {shown(f'{module}.{part}')} is missing, but "
                    f"{shown(f'{module}.{next(iter(parts))}')} is there; download the model again"
                )
        if f"{module}.weight" in dense:
            raise InputError(
                f"{path}: {shown(module)} is there packed and dense ({module}.weight); one of the "
                f"files belongs to another model"
            )
    return modules, dense


def check_part(info: TensorInfo, types: Sequence[GgmlType], n_dims: int) -> None:
    """Raise InputError for a packed tensor of another type or number of dimensions."""
    if info.type not in types or len(info.shape) != n_dims or 0 in info.shape:
        wanted = " or ".join(type.name for type in types)
        raise InputError(
            f"{info.path}: tensor {shown(info.name)} is {info.type} of shape {list(info.shape)}; "
            f"expected {wanted} with {n_dims} dimension{'s' * (n_dims > 1)}"
        )


def check_scales(
    what: str, scales: npt.NDArray[np.floating[Any]], *, may_be_zero: bool = False
) -> None:
    """Raise InputError for scales that make no weight: NaN, Inf or, unless it `may_be_zero`, 0."""
    wide = scales.astype(np.float32)
    bad = int(np.count_nonzero(~np.isfinite(wide)))
    if bad:
        raise InputError(f"{bad} of {scales.size} {what} are NaN or Inf; the file is damaged")
    zero = scales.size - int(np.count_nonzero(wide))
    if zero and not may_be_zero:
        raise InputError(f"{zero} of {scales.size} {what} are 0; the file is damaged")


def drop_empty_biases(
    dense: dict[str, TensorInfo],
    modules: Mapping[str, Any],
    expected: Mapping[str, Any],
    read: Read,
) -> None:
    """Take out biases that a packer gave to linears that have none: AutoGPTQ's, all zeros."""
    for module in modules:
        name = f"{module}.bias"
        if name in dense and name not in expected and not read(dense[name]).any():
            del dense[name]
