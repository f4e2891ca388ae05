"""`--method compensated`: each matrix of the layers makes up for its own errors and earlier ones.

The types are those of the plan, the tokens those of a calibration. A layer is quantized stage by
stage, on the inputs that the quantized stages before it give, and aims at the original's output:
see `two_ways`, `dsq.quant.solver`, and docs/fidelity.md for what was measured. A finished layer is
kept in `OUT.partial`, so that a run which was killed goes on with the next.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsq.convert.atomic import check_space, sync
from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
from dsq.convert.gguf.writer import shard_paths
from dsq.convert.names import gguf_name, permuted_heads
from dsq.convert.pipeline import GgufPlan, Progress, check_outputs, run_gguf_plan
from dsq.convert.tensor_plan import TensorStep, interleaved_rows
from dsq.errors import InputError
from dsq.quant import ggml
from dsq.quant.compensated import compensated
from dsq.quant.grids import GRIDS
from dsq.quant.scheme import GgmlType
from dsq.quant.solver import DAMP, aim, factor
from dsq.quant.threads import default_threads, torch_threads
from dsq.runtime.calibration.workdir import WorkDir, settings_hash
from dsq.runtime.decoder import STAGES, chosen_device, read_layer, read_tensor
from dsq.runtime.fidelity.source_check import source_identity
from dsq.runtime.fidelity.two_ways import Seen, TwoWays
from dsq.runtime.torch_setup import need_torch

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


@dataclass(frozen=True)
class Report:
    """What was done. `seconds`: of this run, on the layers alone."""

    paths: tuple[Path, ...]
    size_bytes: int
    n_tokens: int
    seconds: float
    resumed_layers: int  # done by an earlier run
    tensors: tuple[TensorReport, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": self.n_tokens,
            "seconds": round(self.seconds, 3),
            "resumed_layers": self.resumed_layers,
            "tensors": [tensor.to_json() for tensor in self.tensors],
        }


def quantize(
    checkpoint: HfCheckpoint | GgufCheckpoint,
    plan: GgufPlan,
    ids: npt.NDArray[np.int32],
    out: Path,
    options: Options | None = None,
    *,
    force: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress = lambda n: None,
) -> Report:
    """Write the file of `plan`, its layers compensated on the windows `ids` (windows, n_ctx).

    A run that was killed goes on where it was, and ends with the same bytes. Raises InputError for
    damaged weights, an output that exists (unless `force`) or is being written, an unfinished run
    with other settings, and a disk too small or full (the finished layers are kept).
    """
    need_torch("--method compensated")
    options = options or Options()
    check_outputs(checkpoint, plan, out, force=force or WorkDir.owns(out))
    device, threads = chosen_device(options.device), options.n_threads or default_threads()
    settings = settings_hash(
        source_identity(checkpoint),
        [(step.name, step.stored.name, step.to.name) for step in plan.steps],
        (options.damp, threads, device),
        [version(name) for name in ("dsq", "torch")],
        ids,
    )
    with WorkDir(out, settings) as work, torch_threads(threads):
        resumed = work.done
        if not resumed:
            needed = TwoWays.disk_bytes(checkpoint.spec, ids.size) + 2 * plan.layout.data_bytes
            check_space(out, needed)
        with _opened(checkpoint, plan.steps, ids, work, options.damp, device, threads) as made:
            artifact = run_gguf_plan(
                checkpoint,
                plan,
                work.path / out.name,
                force=True,
                threads=threads,
                allow_nonfinite=allow_nonfinite,
                progress=progress,
                made=made.take,
            )
        paths = shard_paths(out, len(artifact.paths))
        ready = [path.name for path in artifact.paths]
        work.finish_all(dict(zip(ready, paths, strict=True)), force=force)
    return Report(
        tuple(paths), artifact.size_bytes, ids.size, made.seconds, resumed, tuple(made.reports)
    )


class _Compensation:
    """Makes the tensors of a plan's layers, one layer in memory.

    `take` must be asked for the plan's steps in their order. `reports` and `seconds` (of this work
    alone) grow as layers are done.
    """

    def __init__(
        self,
        checkpoint: HfCheckpoint | GgufCheckpoint,
        steps: Sequence[TensorStep],
        work: WorkDir,
        ways: TwoWays | None,
        damp: float,
        pool: Executor,
    ) -> None:
        self.checkpoint, self.damp = checkpoint, damp
        self.reports: list[TensorReport] = []
        self.seconds = 0.0
        self._steps = {step.name: step for step in steps}
        self._work, self._opened_ways, self._pool = work, ways, pool
        self._made: dict[str, U8Array] = {}
        self._layer = -1

    @property
    def _ways(self) -> TwoWays:
        assert self._opened_ways is not None, "there are layers to do"
        return self._opened_ways

    def take(self, step: TensorStep) -> U8Array | None:
        """The tensor's rows (n_rows, row_bytes) as the file wants them; None: make them plainly."""
        layer = _layer_of(step.name)
        if layer is not None:
            while self._layer < layer:
                self._layer += 1
                self._made = self._make(self._layer)
        return self._made.pop(step.name, None)

    def _make(self, layer: int) -> dict[str, U8Array]:
        """The layer's tensors: those that an earlier run has left, or new ones, which are kept."""
        from safetensors.numpy import load_file, save

        path = self._work.path / f"layer-{layer}.safetensors"
        made: dict[str, U8Array] = {}

        def quantized() -> list[dict[str, Any]]:
            start = time.perf_counter()
            found, reports = self._quantize_layer(layer)
            made.update(found)
            self.seconds += time.perf_counter() - start
            path.write_bytes(save(made))  # save_file has an error of its own for a full disk
            sync(path)
            self._ways.sync()
            return [report.to_json() for report in reports]

        reports = self._work.once(f"layer {layer}", quantized)
        self.reports += [TensorReport(**report) for report in reports]
        return made or load_file(path)

    def _quantize_layer(self, layer: int) -> tuple[dict[str, U8Array], list[TensorReport]]:
        ways = self._ways
        if layer == 0:
            self._embed()
        weights = read_layer(self.checkpoint, layer, ways.graph.device)
        for name, values in weights.items():
            if not bool(values.isfinite().all()):
                raise InputError(
                    f"{gguf_name(f'model.layers.{layer}.{name}')}: weights are NaN or Inf; the "
                    f"checkpoint is damaged, and cannot be calibrated"
                )
        ways.enter(weights)
        made: dict[str, U8Array] = {}
        reports: list[TensorReport] = []
        for stage, names in STAGES.items():
            seen = ways.see(stage)
            steps = {n: self._step(f"model.layers.{layer}.{n}.weight") for n in names}
            for to in dict.fromkeys(step.to for step in steps.values()):
                alike = {n: step for n, step in steps.items() if step.to is to}
                if to.is_quantized:
                    made |= self._compensate(seen, to, alike, reports)
                else:
                    self._keep(to, alike)
        if layer + 1 < self.checkpoint.spec.n_layer:
            ways.leave()
        return made, reports

    def _compensate(
        self,
        seen: Seen,
        to: GgmlType,
        alike: Mapping[str, TensorStep],
        reports: list[TensorReport],
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
            reports.append(TensorReport(step.name, to.name, under.damp, under.dead, error))
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
def _opened(
    checkpoint: HfCheckpoint | GgufCheckpoint,
    steps: Sequence[TensorStep],
    ids: npt.NDArray[np.int32],
    work: WorkDir,
    damp: float,
    device: str,
    threads: int,
) -> Iterator[_Compensation]:
    """What makes the tensors, with its threads and, for the layers to do, its files in `work`."""
    with ExitStack() as stack:
        ways = None
        if work.done < checkpoint.spec.n_layer:
            ways = TwoWays(checkpoint.spec, ids, work.path, device, layer=work.done)
            stack.enter_context(ways)
        pool = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="dsq-scales"))
        yield _Compensation(checkpoint, steps, work, ways, damp, pool)


def _rounded(weight: Tensor, to: GgmlType) -> Tensor:
    """`weight` as ggml stores it in `to`."""
    import torch

    data = ggml.quantize(weight.cpu().contiguous().numpy(), to)
    out = torch.empty(weight.shape)
    ggml.dequantize_into(data.reshape(-1), to, out.numpy())
    return out.to(weight.device)


def _layer_of(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("blk.") else None
