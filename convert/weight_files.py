"""The weights of a Hugging Face directory: one file or shards, safetensors or .bin."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Sequence
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
    return _open(found)


def open_packed_weights(directory: Path, stems: Sequence[str]) -> Weights:
    """As `open_weights`, for packed weights: safetensors with integers, under more names.

    `stems` are tried before `model`: `STEM.safetensors`, or `STEM-00001-of-0000N.safetensors`
    without an index, as exllamav2 leaves them beside the index of the model that it started from.
    """
    for stem in stems:
        whole = directory / f"{stem}.safetensors"
        paths = [whole] if whole.is_file() else _shards(directory, stem)
        if paths:
            files = MappedFiles()
            tensors = _merge((path, read_header(path, integers=True)) for path in paths)
            return Weights(tensors, files.view)
    found = _find(directory)
    if found is None or not found.name.startswith(_SAFETENSORS):
        names = ", ".join(f"{stem}.safetensors" for stem in ("model", *stems))
        raise InputError(
            f"{directory}: no packed weights: expected {names}, or shards; .bin files are not read"
        )
    return _open(found, integers=True)


def _shards(directory: Path, stem: str) -> list[Path]:
    """All shards of `stem`; none if there is no first one."""
    first = sorted(directory.glob(f"{glob.escape(stem)}-00001-of-?????.safetensors"))
    if not first:
        return []
    count = first[0].name.removesuffix(".safetensors")[-5:]
    if len(first) > 1 or not count.isdigit():
        raise InputError(f"{directory}: {stem} is there in shards of two models; keep one")
    names = [f"{stem}-{i:05d}-of-{count}.safetensors" for i in range(1, int(count) + 1)]
    for name in names:
        if not (directory / name).is_file():
            raise InputError(
                f"{directory / name}: missing, but {first[0].name} is there; download it"
            )
    return [directory / name for name in names]


def _open(found: Path, *, integers: bool = False) -> Weights:
    """The weights of one file, or of the shards that an index lists."""
    weight_map = _weight_map(found) if found.name.endswith(".index.json") else None
    paths = (
        [found] if weight_map is None else sorted({found.parent / s for s in weight_map.values()})
    )
    if found.name.startswith(_SAFETENSORS):
        files = MappedFiles()
        tensors = _merge((path, read_header(path, integers=integers)) for path in paths)
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
