"""A Hugging Face directory of quantized weights (GPTQ, EXL2), written layer by layer.

Its tensors are known beforehand and made one layer at a time, in a run that may be killed and gone
on with: each has its place in a shard of the work folder from the start, and is put there as often
as need be. The directory appears under its name when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from dsq.convert.atomic import DiskError, check_directory, write_text
from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
from dsq.convert.hf.shards import DTYPES, SHARD_BYTES, OutTensor, cut, header, index
from dsq.convert.hf.writer import config_json, generation_config_json, is_model_file
from dsq.convert.names import gguf_name, permuted_heads
from dsq.convert.tensor_plan import half_split_rows
from dsq.errors import InputError
from dsq.quant import ggml
from dsq.quant.fileio import reserve, write_at
from dsq.quant.scheme import BF16, F16, GgmlType
from dsq.tokenizer_port.to_hf import hf_files

__all__ = [
    "DirectoryWriter",
    "OutTensor",
    "check_output",
    "dense_data",
    "dense_tensor",
    "dense_type",
    "is_quantized_file",
    "model_files",
]

_FLOATS = {"f16": "F16", "bf16": "BF16"}
_READY, _OLD = "ready", "replaced"  # folders in the work folder


def is_quantized_file(name: str) -> bool:
    """What these directories hold: all that `--force` may replace."""
    return name in ("quantize_config.json", "measurement.json") or is_model_file(name)


def check_output(out: Path, *, force: bool) -> None:
    """Refuse a directory that may not be replaced. Raises InputError."""
    check_directory(out, force=force, ours=is_quantized_file)


class DirectoryWriter:
    """The files of the directory `out`, in the folder `work` until it is complete; a context.

    A work folder that holds the files of the same tensors is gone on with. Raises OSError, for a
    full disk at once: every shard takes its space when it is made.
    """

    def __init__(
        self,
        work: Path,
        out: Path,
        tensors: Sequence[OutTensor],
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.work, self.out = work, out
        self._shards = cut(tensors, shard_bytes)
        self._places: dict[str, tuple[int, OutTensor, int]] = {}  # file, tensor, offset
        self._files = ExitStack()
        self._open: list[int] = []
        self.n_bytes = sum(t.n_bytes for t in tensors)

    def __enter__(self) -> DirectoryWriter:
        try:
            for name, members in self._shards.items():
                self._make(self.work / name, members)
        except BaseException:
            self._files.close()
            raise
        return self

    def put(self, name: str, values: npt.NDArray[Any]) -> None:
        """Write the tensor of that name; bf16 is given as uint16."""
        file, tensor, offset = self._places[name]
        wanted = np.dtype(DTYPES[tensor.dtype])
        if values.shape != tensor.shape or values.dtype != wanted:
            raise ValueError(f"{name}: {values.dtype} {values.shape} for {tensor}")
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        write_at(file, data.data, offset)

    def sync(self) -> None:
        """What was put so far survives a power cut."""
        for file in self._open:
            os.fsync(file)

    def complete(self, files: Mapping[str, Any], *, force: bool = False) -> str:
        """Put `files` (name → content, as JSON), the index and the shards into one folder.

        Returns its name in the work folder, for the caller to rename to `out`, whose way is free
        then. A kill between any two steps leaves what a later run can finish in the same way.
        """
        self.sync()
        ready = self.work / _READY
        ready.mkdir(exist_ok=True)
        for name in self._shards:
            if (self.work / name).exists():
                (self.work / name).replace(ready / name)
        for name, content in {**files, **index(self._shards)}.items():
            write_text(ready / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        try:
            check_output(self.out, force=force)
        except InputError as error:  # it came while we worked: what is done is kept
            raise DiskError(str(error)) from error
        if self.out.exists():
            if (self.work / _OLD).exists():  # of a run that was killed here
                shutil.rmtree(self.work / _OLD)
            self.out.replace(self.work / _OLD)
        return _READY

    def _make(self, path: Path, members: Sequence[OutTensor]) -> None:
        moved = self.work / _READY / path.name
        if moved.exists() and not path.exists():
            path = moved
        top, offsets = header(members)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._files.callback(os.close, file)
        self._open.append(file)
        size = len(top) + sum(t.n_bytes for t in members)
        if os.fstat(file).st_size != size or os.pread(file, len(top), 0) != top:
            os.ftruncate(file, 0)
            reserve(file, size)
            write_at(file, top, 0)
        for tensor, offset in zip(members, offsets, strict=True):
            self._places[tensor.name] = file, tensor, offset

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.close()


def dense_type(checkpoint: HfCheckpoint | GgufCheckpoint) -> GgmlType:
    """What embedding, norms, head and biases are stored in: the source's type, f16 for f32.

    Raises InputError for a source that is quantized.
    """
    kinds = {t.type for t in checkpoint.tensors.values() if len(t.shape) > 1}
    quantized = sorted(kind.name for kind in kinds if kind.is_quantized)
    if isinstance(checkpoint, HfCheckpoint) and checkpoint.packed is not None:
        quantized = [checkpoint.packed.method]
    if quantized:
        raise InputError(
            f"{checkpoint.path}: its weights are {quantized[0]} already; quantizing again loses "
            f"more than quantizing the original: give the f16 or bf16 model"
        )
    return BF16 if kinds == {BF16} else F16


def dense_tensor(hf_name: str, shape: tuple[int, ...], to: GgmlType) -> OutTensor:
    return OutTensor(hf_name, _FLOATS[to.name], shape)


def dense_data(
    checkpoint: HfCheckpoint | GgufCheckpoint, hf_name: str, to: GgmlType
) -> npt.NDArray[Any]:
    """A tensor of the source in `to` (f16, or bf16 as uint16), in Hugging Face's row order.

    Raises InputError naming a tensor that holds NaN, Inf, or what f16 cannot hold.
    """
    is_gguf = checkpoint.format == "gguf"
    name = gguf_name(hf_name) if is_gguf else hf_name
    info = checkpoint.tensors[name]
    raw = np.ascontiguousarray(checkpoint.data(name))
    values = ggml.dequantize(raw, info.type, info.n_elements)
    stored = raw.view("<u2") if info.type is to else _rounded(values, to)
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= (65504.0 if to is F16 else np.finfo(np.float32).max):  # NaN too
        raise InputError(f"{hf_name}: weights go up to {largest:g}, which {to} cannot hold")
    stored = stored.reshape(info.shape)
    heads = permuted_heads(name, checkpoint.spec) if is_gguf else None
    if heads:
        stored = stored[half_split_rows(len(stored), heads)]
    return stored.view("<f2") if to is F16 else stored


def model_files(
    checkpoint: HfCheckpoint | GgufCheckpoint,
    dense: GgmlType,
    quantization_config: Mapping[str, Any],
    *,
    pre: str | None = None,
) -> dict[str, Any]:
    """The directory's small files by name: config with RoPE factor, generation config, tokenizer.

    The RoPE is spelt as exllamav2 and transformers 4 and 5 read it: see `Rope.to_config`.
    """
    vocab = checkpoint.vocabulary(pre=pre)
    config = config_json(checkpoint.spec, vocab, dense)
    return {
        "config.json": {**config, "quantization_config": dict(quantization_config)},
        "generation_config.json": generation_config_json(vocab),
        **hf_files(vocab, checkpoint.spec.n_ctx),
    }


def _rounded(values: npt.NDArray[np.float32], to: GgmlType) -> npt.NDArray[Any]:
    return ggml.quantize(values.reshape(1, -1), to).reshape(-1).view("<u2")
