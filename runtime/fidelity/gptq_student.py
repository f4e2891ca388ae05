"""What is learned of a GPTQ directory that is being written, and how it gets into the files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsq.convert.atomic import sync
from dsq.convert.hf.quantized_dir import DirectoryWriter
from dsq.convert.mapped import MappedFiles
from dsq.convert.names import expected_tensors
from dsq.convert.safetensors_reader import read_header
from dsq.quant.gptq_layout import PARTS
from dsq.quant.gptq_tunable import GptqTunable
from dsq.quant.scheme import BF16, GgmlType
from dsq.runtime.decoder import read_tensor
from dsq.runtime.fidelity.gptq_plan import Plan
from dsq.runtime.fidelity.student import Gain, Parts, as_stored

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {"i32": "<i4", "f16": "<f2"}


class GptqStudent:
    """The model whose packed matrices lie in the shards of `folder`; the rest is the source's, as
    `plan` stores it."""

    def __init__(self, plan: Plan, folder: Path, device: str) -> None:
        self._dense = plan.dense
        files = MappedFiles()
        infos = {
            name: info
            for path in sorted(folder.glob("model*.safetensors"))
            for name, info in read_header(path, integers=True).items()
        }
        self._tunables: dict[str, GptqTunable] = {}
        self._gains: dict[str, Gain] = {}
        fixed: dict[str, Tensor] = {}
        for name in expected_tensors(plan.checkpoint.spec):
            linear = plan.linears.get(name.removesuffix(".weight"))
            if linear is not None and linear.scheme is not None and name != linear.name:
                parts = {}
                for part in PARTS:
                    info = infos[f"{linear.name}.{part}"]
                    parts[part] = files.view(info).view(_DTYPES[info.type.name]).reshape(info.shape)
                self._tunables[name] = GptqTunable(
                    parts, linear.scheme.bits, plan.options.checkpoint_format, device
                )
                continue
            values = as_stored(read_tensor(plan.checkpoint, name, device), plan.dense)
            if name.endswith("norm.weight"):
                self._gains[name] = Gain(values, plan.dense)
            else:
                fixed[name] = values
        self.parts = Parts(plan.checkpoint.spec, self._tunables, self._gains, fixed)

    def save(self, path: Path) -> None:
        """Keep the learned numbers: `put` overwrites those that they are relative to."""
        import torch

        tensors = {
            f"{name.removesuffix('.weight')}.scales": tunable.scales().half()
            for name, tunable in self._tunables.items()
        }
        tensors |= {
            name: _typed(gain.weight().detach(), self._dense) for name, gain in self._gains.items()
        }
        torch.save(tensors, path)
        sync(path)


def put(path: Path, writer: DirectoryWriter) -> None:
    """Write what `GptqStudent.save` has kept; doing it twice changes nothing."""
    import torch

    for name, values in torch.load(path, map_location="cpu", weights_only=True).items():
        writer.put(name, _array(values))
    writer.sync()


def _typed(values: Tensor, to: GgmlType) -> Tensor:
    return values.bfloat16() if to is BF16 else values.half()


def _array(values: Tensor) -> npt.NDArray[Any]:
    """As `DirectoryWriter.put` wants it: bf16 as its bits."""
    import torch

    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).numpy().view(np.uint16)
    return values.numpy()
