"""What is learned of a GGUF file, and a copy of the file with the learned numbers in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dsq.convert.atomic import sync
from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
from dsq.convert.names import expected_tensors, gguf_name, permuted_heads
from dsq.convert.tensor_plan import half_split_rows, interleaved_rows
from dsq.errors import DsqError, InputError
from dsq.quant.grids import GRIDS
from dsq.quant.tunable import Tunable
from dsq.runtime.decoder import read_tensor
from dsq.runtime.fidelity.student import EMBEDDING, HEAD, Gain, Parts

if TYPE_CHECKING:
    from torch import Tensor


class GgufStudent:
    """A GGUF file, taken apart. Raises InputError for a file with no scales that can be tuned."""

    def __init__(self, file: GgufCheckpoint, device: str) -> None:
        self.file = file
        self._tunables: dict[str, Tunable] = {}
        self._gains: dict[str, Gain] = {}
        fixed: dict[str, Tensor] = {}
        for name, shape in expected_tensors(file.spec).items():
            info = file.tensors[gguf_name(name)]
            if len(shape) == 2 and info.type.name in GRIDS and name not in (EMBEDDING, HEAD):
                data = file.data(info.name).reshape(shape[0], -1)
                heads = permuted_heads(info.name, file.spec)
                rows = data[half_split_rows(len(data), heads)] if heads else data
                self._tunables[name] = Tunable(rows, info.type, shape[1], device)
            elif name.endswith("norm.weight"):
                self._gains[name] = Gain(read_tensor(file, name, device))
            else:
                fixed[name] = read_tensor(file, name, device)
        if not self._tunables:
            raise InputError(
                f"{file.path}: no tensor of a type whose scales dsq can tune ({', '.join(GRIDS)})"
            )
        self.parts = Parts(file.spec, self._tunables, self._gains, fixed)

    def write(self, out: Path) -> None:
        """A copy of the file with the learned numbers in it."""
        shutil.copyfile(self.file.path, out)
        with open(out, "r+b") as target:
            for name, data in self._changed():
                info = self.file.tensors[name]
                if len(data) != info.n_bytes:
                    raise DsqError(f"{name}: {len(data)} bytes where {info.n_bytes} are stored")
                target.seek(info.offset)
                target.write(data)
        sync(out)

    def _changed(self) -> Iterator[tuple[str, bytes]]:
        for name, tensor in self._tunables.items():
            gguf, packed = gguf_name(name), tensor.packed()
            heads = permuted_heads(gguf, self.file.spec)
            rows = packed[interleaved_rows(len(packed), heads)] if heads else packed
            yield gguf, rows.tobytes()
        for name, gain in self._gains.items():
            yield gguf_name(name), gain.weight().detach().cpu().numpy().astype("<f4").tobytes()


def check_pair(source: HfCheckpoint | GgufCheckpoint, file: GgufCheckpoint) -> None:
    """Raise InputError when the file cannot be of the source."""
    for key in ("n_layer", "n_embd", "n_ff", "n_head", "n_head_kv", "head_dim", "n_vocab"):
        mine, theirs = getattr(file.spec, key), getattr(source.spec, key)
        if mine != theirs:
            raise InputError(
                f"{file.path}: {key} is {mine}, but {theirs} in {source.path}; give the model "
                "that the file was quantized from"
            )
