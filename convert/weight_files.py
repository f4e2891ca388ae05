"""The weights of a Hugging Face directory: one file or shards, safetensors or .bin."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dsq.convert.json_file import read_object, shown
from dsq.convert.mapped import MappedFiles
from dsq.convert.names import is_ignored
from dsq.convert.safetensors_reader import read_header
from dsq.convert.tensors import TensorInfo
from dsq.convert.torch_bin import TorchFile
from dsq.errors import InputError

# transformers' order of preference; `consolidated.*` is the same model in Meta's naming
_SAFETENSORS, _BIN = "model.safetensors", "pytorch_model.bin"

Read = Callable[[TensorInfo], "npt.NDArray[np.uint8]"]


@dataclass(frozen=True)
class Weights:
    """Tensors by name, without the ignored buffers, and how to read one."""

    tensors: dict[str, TensorInfo]
    read: Read


def has_weights(directory: Path) -> bool:
    return _find(directory) is not None


def open_weights(directory: Path) -> Weights:
    """Find the weight files of `directory` and read their headers."""
    found = _find(directory)
    if found is None:
        raise InputError(
            f"{directory}: no weights: expected {_SAFETENSORS} or {_BIN}, or their .index.json "
            f"with shards"
        )
    weight_map = _weight_map(found) if found.name.endswith(".index.json") else None
    paths = (
        [found] if weight_map is None else sorted({found.parent / s for s in weight_map.values()})
    )
    if found.name.startswith(_SAFETENSORS):
        files = MappedFiles()
        tensors = _merge((path, read_header(path)) for path in paths)
        weights = Weights(tensors, files.view)
    else:
        torch_files = {path: TorchFile(path) for path in paths}
        tensors = _merge((path, file.tensors) for path, file in torch_files.items())
        weights = Weights(tensors, lambda info: torch_files[info.path].data(info.name))
    if weight_map is not None:
        _check_index(found, weight_map, tensors)
    return weights


def _find(directory: Path) -> Path | None:
    for name in (_SAFETENSORS, _BIN):
        for path in (directory / name, directory / f"{name}.index.json"):
            if path.is_file():
                return path
    return None


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor → shard, after checking that each shard is a file beside the index."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map is missing or empty; download the file again")
    for tensor, shard in weight_map.items():
        # A name with a folder in it could point anywhere on the disk
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(f"{index}: tensor {shown(tensor)} is in {shard!r}, no plain file name")
    for shard in sorted(set(weight_map.values())):
        if not (index.parent / shard).is_file():
            raise InputError(
                f"{index.parent / shard}: missing, but {index.name} lists it; download it"
            )
    return weight_map


def _merge(files: Iterable[tuple[Path, dict[str, TensorInfo]]]) -> dict[str, TensorInfo]:
    merged: dict[str, TensorInfo] = {}
    for path, tensors in files:
        for name, info in tensors.items():
            if is_ignored(name):
                continue
            if name in merged:
                raise InputError(
                    f"{path}: tensor {shown(name)} is in {merged[name].path.name} as well; "
                    f"one of the shards belongs to another model"
                )
            merged[name] = info
    return merged


def _check_index(index: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    for name, shard in weight_map.items():
        if not is_ignored(name) and (name not in tensors or tensors[name].path.name != shard):
            raise InputError(
                f"{index}: says that tensor {shown(name)} is in {shard}, but it is not; "
                f"download both again"
            )
    for name, info in tensors.items():
        if name not in weight_map:
            raise InputError(
                f"{info.path}: tensor {shown(name)} is not in {index.name}; download both again"
            )
