"""`--method compensated`: each matrix of the layers makes up for its own errors and earlier ones.

The types are those of the plan, the tokens those of a calibration. A layer is quantized stage by
stage, on the inputs that the quantized stages before it give, and aims at the original's output:
see `two_ways`, `dsq.quant.solver`, and docs/fidelity.md for what was measured.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsq.convert.atomic import check_space, os_error
from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
from dsq.convert.names import gguf_name, permuted_heads
from dsq.convert.tensor_plan import TensorStep, interleaved_rows
from dsq.errors import InputError
from dsq.quant import ggml
from dsq.quant.compensated import compensated
from dsq.quant.grids import GRIDS
from dsq.quant.scheme import GgmlType
from dsq.quant.solver import DAMP, aim, factor
from dsq.quant.threads import default_threads
from dsq.runtime.decoder import STAGES, chosen_device, read_layer, read_tensor
from dsq.runtime.fidelity.two_ways import Seen, TwoWays

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from torch import Tensor

U8Array = npt.NDArray[np.uint8]
_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Options:
    """`damp`: what is added to a Hessian's diagonal, as a share of its mean."""

    damp: float = DAMP
    n_threads: int | None = None
    device: str = "auto"  # or "cpu", "cuda"


@dataclass(frozen=True)
class TensorReport:
    """How one tensor came out.

    `error` is the mean squared error of its output as a share of what it would be with every weight
    rounded to the nearest on the same scales; None for a type whose rounding is left to ggml.
    """

    name: str
    type: str
    damp: float
    dead_channels: int
    error: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Compensation:
    """Makes the tensors of a plan's layers, one layer in memory; see `opened`.

    `take` must be asked for the plan's steps in their order. `reports` and `seconds` (of this work
    alone) grow as layers are done.
    """

    def __init__(
        self,
        checkpoint: HfCheckpoint | GgufCheckpoint,
        steps: Sequence[TensorStep],
        ways: TwoWays,
        damp: float,
        pool: Executor,
    ) -> None:
        self.checkpoint, self.damp = checkpoint, damp
        self.reports: list[TensorReport] = []
        self.seconds = 0.0
        self._steps = {step.name: step for step in steps}
        self._ways, self._pool = ways, pool
        self._made: dict[str, U8Array] = {}
        self._layer = -1

    def take(self, step: TensorStep) -> U8Array | None:
        """The tensor's rows (n_rows, row_bytes) as the file wants them; None: make them plainly."""
        layer = _layer_of(step.name)
        if layer is not None:
            while self._layer < layer:
                self._layer += 1
                start = time.perf_counter()
                self._made = self._quantize_layer(self._layer)
                self.seconds += time.perf_counter() - start
        return self._made.pop(step.name, None)

    def _quantize_layer(self, layer: int) -> dict[str, U8Array]:
        ways = self._ways
        if layer == 0:
            self._embed()
        else:
            ways.leave()
        weights = read_layer(self.checkpoint, layer, ways.graph.device)
        for name, values in weights.items():
            if not bool(values.isfinite().all()):
                raise InputError(
                    f"{gguf_name(f'model.layers.{layer}.{name}')}: weights are NaN or Inf; the "
                    f"checkpoint is damaged, and cannot be calibrated"
                )
        ways.enter(weights)
        made: dict[str, U8Array] = {}
        for stage, names in STAGES.items():
            seen = ways.see(stage)
            steps = {n: self._step(f"model.layers.{layer}.{n}.weight") for n in names}
            for to in dict.fromkeys(step.to for step in steps.values()):
                alike = {n: step for n, step in steps.items() if step.to is to}
                if to.is_quantized:
                    made.update(self._compensate(seen, to, alike))
                else:
                    self._keep(to, alike)
        return made

    def _compensate(
        self, seen: Seen, to: GgmlType, alike: Mapping[str, TensorStep]
    ) -> dict[str, U8Array]:
        """Quantize the matrices that read one input and have one type: as one matrix."""
        import torch

        weights = [self._ways.original[f"{name}.weight"] for name in alike]
        first = next(iter(alike.values())).name
        under = factor(seen.hessian, first, self.damp)
        weight = torch.cat(weights)
        target = aim(weight, seen.missing(weight), under)
        ones = torch.ones_like(under.cost)
        importance = ones if to.name in GRIDS else seen.hessian.diagonal()
        found = compensated(first, target, under, to, importance, self._pool)
        made: dict[str, U8Array] = {}
        start = 0
        for (name, step), rows in zip(alike.items(), map(len, weights), strict=True):
            part = slice(start, start + rows)
            start += rows
            self._ways.put(name, found.values[part].contiguous())
            made[step.name] = self._in_order(step, found.data[part])
            error = None
            if found.nearest is not None:
                error = float(found.error[part].sum() / found.nearest[part].sum().clamp(min=1e-30))
            self.reports.append(TensorReport(step.name, to.name, under.damp, under.dead, error))
        return made

    def _keep(self, to: GgmlType, alike: Mapping[str, TensorStep]) -> None:
        """A float type: rounded for the stored way; the stream makes the same of it."""
        for name, step in alike.items():
            weight = self._ways.original[f"{name}.weight"]
            if to is not step.stored:
                self._ways.put(name, _rounded(weight, to))

    def _embed(self) -> None:
        """Only the rows of tokens that occur are quantized here: a row does not know the others."""
        import torch

        embedding = read_tensor(self.checkpoint, _EMBEDDING)
        step = self._step(_EMBEDDING)
        stored = embedding.clone()
        if step.to is not step.stored:
            rows = torch.from_numpy(np.unique(self._ways.ids).astype(np.int64))
            stored[rows] = _rounded(embedding[rows], step.to)
        self._ways.embed(embedding, stored)

    def _step(self, hf_name: str) -> TensorStep:
        return self._steps[gguf_name(hf_name)]

    def _in_order(self, step: TensorStep, rows: U8Array) -> U8Array:
        """GGUF's row order: Q and K interleaved."""
        heads = permuted_heads(step.name, self.checkpoint.spec)
        return rows if heads is None else rows[interleaved_rows(len(rows), heads)]


@contextmanager
def opened(
    checkpoint: HfCheckpoint | GgufCheckpoint,
    steps: Sequence[TensorStep],
    ids: npt.NDArray[np.int32],
    out: Path,
    options: Options | None = None,
) -> Iterator[Compensation]:
    """A compensation on the windows `ids` (windows, n_ctx), for writing `out`.

    Its files, which can be large, lie beside `out` while it lasts. Raises InputError for a disk too
    small; later, in `take`, for damaged weights.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"--method compensated needs PyTorch, which is not installed ({error}); "
            "pip install 'dsq[torch]'"
        ) from error
    options = options or Options()
    check_space(out, TwoWays.disk_bytes(checkpoint.spec, ids.size))
    device = chosen_device(options.device)
    threads = options.n_threads or default_threads()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with (
            tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder,
            TwoWays(checkpoint.spec, ids, Path(folder), device) as ways,
            ThreadPoolExecutor(threads, thread_name_prefix="dsq-scales") as pool,
        ):
            yield Compensation(checkpoint, steps, ways, options.damp, pool)
    except OSError as error:
        raise os_error(error, out) from error
    finally:
        torch.set_num_threads(before)


def _rounded(weight: Tensor, to: GgmlType) -> Tensor:
    """`weight` as ggml stores it in `to`."""
    import torch

    data = ggml.quantize(weight.cpu().contiguous().numpy(), to)
    out = torch.empty(weight.shape)
    ggml.dequantize_into(data.reshape(-1), to, out.numpy())
    return out.to(weight.device)


def _layer_of(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("blk.") else None
