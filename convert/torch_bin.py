"""Reads pytorch_model.bin files, with torch's own loader: they are pickles."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dsq.convert.json_file import shown
from dsq.convert.names import is_ignored
from dsq.convert.tensors import TensorInfo
from dsq.errors import DsqError, InputError, UnsupportedError
from dsq.quant.scheme import BF16, F16, F32, GgmlType

if TYPE_CHECKING:
    import torch


class TorchFile:
    """One file of tensors. Only `data` knows where they lie: `TensorInfo.offset` is 0."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = _load(path)
        self.tensors = {name: _info(name, t, path) for name, t in self._tensors.items()}

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes, shape (n_bytes,): a view of the mapped file if it is contiguous."""
        import torch

        tensor = self._tensors[name].detach().contiguous().reshape(-1)
        data: npt.NDArray[np.uint8] = tensor.view(torch.uint8).numpy()
        return data


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        import torch
    except ImportError as error:
        raise DsqError(
            f"{path}: reading .bin checkpoints needs torch; pip install 'dsq[torch]', or give a "
            f"checkpoint in safetensors"
        ) from error
    try:
        # weights_only refuses pickles that would run code; only zip archives can be mapped
        loaded = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).strip().splitlines()
        raise InputError(
            f"{path}: torch cannot load the weights "
            f"({reason[0][:160] if reason else type(error).__name__}); the file is damaged or "
            f"holds more than tensors"
        ) from error
    if not isinstance(loaded, Mapping):
        raise InputError(f"{path}: holds a {type(loaded).__name__}; expected names and tensors")
    found: dict[str, torch.Tensor] = {}
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise InputError(
                f"{path}: entry {shown(str(name))} is a {type(value).__name__}; expected a tensor"
            )
        if value.layout is not torch.strided:
            raise UnsupportedError(f"{path}: tensor {shown(name)} is sparse; save it dense")
        if not is_ignored(name):
            found[name] = value
    return found


def _info(name: str, tensor: torch.Tensor, path: Path) -> TensorInfo:
    types: dict[str, GgmlType] = {
        "torch.float32": F32,
        "torch.float16": F16,
        "torch.bfloat16": BF16,
    }
    type = types.get(str(tensor.dtype))
    if type is None:
        raise UnsupportedError(
            f"{path}: tensor {shown(name)} is of type {tensor.dtype}, which is not supported "
            f"(supported: {', '.join(types)})"
        )
    return TensorInfo(name, tuple(tensor.shape), type, path, 0, tensor.numel() * type.block_bytes)
