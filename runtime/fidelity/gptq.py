"""`dsq convert --to gptq`: a directory of GPTQ weights, one layer in memory, resumable by layer.

Each matrix makes up for its own errors and for those before it, as `compensate` does for GGUF: see
`two_ways`, `dsq.quant.solver`, and docs/fidelity.md. Embedding, norms, biases and head keep the
source's type. With `Options.distill`, scales and norm gains are tuned at the end: see `distill`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsq.convert.atomic import check_space
from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
from dsq.convert.hf.quantized_dir import DirectoryWriter, check_output, dense_data, model_files
from dsq.convert.pipeline import source_files
from dsq.errors import InputError
from dsq.quant.gptq import Scheme, ordered, quantize
from dsq.quant.gptq_layout import pack
from dsq.quant.threads import default_threads, torch_threads
from dsq.runtime.calibration.workdir import WorkDir, settings_hash
from dsq.runtime.decoder import STAGES, chosen_device, read_layer, read_tensor
from dsq.runtime.fidelity import distill, gptq_student
from dsq.runtime.fidelity.gptq_plan import LINEARS, Linear, Plan, quantization_config
from dsq.runtime.fidelity.source_check import check_weights, source_identity
from dsq.runtime.fidelity.student import EMBEDDING, as_stored
from dsq.runtime.fidelity.teacher import Teacher
from dsq.runtime.fidelity.two_ways import Seen, TwoWays
from dsq.runtime.torch_setup import need_torch

Ids = npt.NDArray[np.int32]
Progress = Callable[[float], None]  # told the share of the work that is done

_TUNED = "tuned.pt"
_LAYERS_SHARE = 0.3  # of the work, where distillation follows


@dataclass(frozen=True)
class TensorReport:
    """How one matrix came out. `error`: the mean squared error of its output as a share of what it
    would be with every weight rounded to the nearest on the same scales."""

    name: str
    bits: int
    group_size: int
    damp: float
    dead_channels: int
    error: float


@dataclass(frozen=True)
class Report:
    out: str
    size_bytes: int
    bpw: float
    n_tokens: int
    resumed_layers: int  # done by an earlier run
    seconds: float
    device: str
    n_threads: int
    tensors: tuple[TensorReport, ...]
    distillation: distill.Report | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def convert(
    plan: Plan,
    ids: Ids,
    out: Path,
    *,
    force: bool = False,
    pre: str | None = None,
    progress: Progress = lambda done: None,
) -> Report:
    """Calibrate on the windows `ids` (windows, n_ctx), and write the directory `out`.

    A run that was killed goes on after the layers that it finished, to the same bytes. Raises
    InputError for an output that exists (unless `force`) or is being written, a disk too small,
    damaged weights, and too few windows to distill on.
    """
    checkpoint, options = plan.checkpoint, plan.options
    need_torch("--to gptq")
    out = out.resolve()
    check_output(out, force=force or WorkDir.owns(out))
    _not_the_source(checkpoint, out)
    device = chosen_device(options.device)
    threads = options.n_threads or default_threads()
    files = model_files(checkpoint, plan.dense, quantization_config(plan), pre=pre)
    files["quantize_config.json"] = quantization_config(plan)
    if options.distill is not None:
        distill.split(_distilled_on(plan, ids), options.distill)  # refuses too few
    start = time.perf_counter()
    settings = settings_hash(
        source_identity(checkpoint),
        [version(name) for name in ("dsq", "torch")],
        *(options, plan.tensors, files, ids, device, threads),
    )
    with WorkDir(out, settings) as work, torch_threads(threads):
        resumed = min(work.done, checkpoint.spec.n_layer)
        if not resumed:
            check_space(out, _disk_bytes(plan, ids))
            check_weights(checkpoint, {t.name for t in plan.tensors}, plan.dense)
        with DirectoryWriter(work.path, out, plan.tensors) as writer:
            run = _Run(plan, ids, device, threads, work, writer)
            reports, distillation = run.go(progress)
            ready = writer.complete(files, force=force)
        work.finish(ready, out)
    return Report(
        out=str(out),
        size_bytes=sum(file.stat().st_size for file in out.iterdir()),
        bpw=round(plan.bpw, 4),
        n_tokens=ids.size,
        resumed_layers=resumed,
        seconds=time.perf_counter() - start,
        device=device,
        n_threads=threads,
        tensors=tuple(TensorReport(**r) for r in reports),
        distillation=distillation,
    )


class _Run:
    """The layers that are left, one by one."""

    def __init__(
        self,
        plan: Plan,
        ids: Ids,
        device: str,
        threads: int,
        work: WorkDir,
        writer: DirectoryWriter,
    ) -> None:
        self.plan, self.ids, self.device = plan, ids, device
        self.threads, self.work, self.writer = threads, work, writer
        self.checkpoint = plan.checkpoint

    def go(self, progress: Progress) -> tuple[list[dict[str, Any]], distill.Report | None]:
        reports = self.layers(progress)
        self.work.once("rest", self.rest)
        return reports, self.distill(progress)

    def layers(self, progress: Progress) -> list[dict[str, Any]]:
        spec = self.checkpoint.spec
        share = 1.0 if self.plan.options.distill is None else _LAYERS_SHARE
        done = min(self.work.done, spec.n_layer)
        reports: list[dict[str, Any]] = []
        with TwoWays(spec, self.ids, self.work.path, self.device, layer=done) as ways:
            for layer in range(spec.n_layer):
                reports += self.work.once(f"layer {layer}", partial(self.layer, layer, ways))
                progress(share * (layer + 1) / spec.n_layer)
        return reports

    def layer(self, layer: int, ways: TwoWays) -> list[dict[str, Any]]:
        prefix = f"model.layers.{layer}."
        if layer == 0:
            embedding = read_tensor(self.checkpoint, EMBEDDING)
            ways.embed(embedding, as_stored(embedding, self.plan.dense))
        weights = read_layer(self.checkpoint, layer, self.device)
        ways.enter(weights)
        for name, values in weights.items():
            if name.removesuffix(".weight") not in LINEARS:
                ways.stored[name] = as_stored(values, self.plan.dense)
        reports: list[dict[str, Any]] = []
        for stage, names in STAGES.items():
            reports += self.stage(prefix, names, ways.see(stage), ways)
        ways.leave()
        for tensor in self.plan.tensors:
            if tensor.name.startswith(prefix) and tensor.name.endswith((".weight", ".bias")):
                self.writer.put(
                    tensor.name, dense_data(self.checkpoint, tensor.name, self.plan.dense)
                )
        ways.sync()
        self.writer.sync()
        return reports

    def stage(
        self, prefix: str, names: Sequence[str], seen: Seen, ways: TwoWays
    ) -> list[dict[str, Any]]:
        """Quantize the matrices that read one input; those of one scheme as one matrix."""
        linears = {name: self.plan.linears[prefix + name] for name in names}
        reports: list[dict[str, Any]] = []
        for scheme in dict.fromkeys(linear.scheme for linear in linears.values()):
            alike = {n: linear for n, linear in linears.items() if linear.scheme == scheme}
            if scheme is not None:
                reports += self.quantize(alike, scheme, seen, ways)
                continue
            for name in alike:
                weight = ways.original[f"{name}.weight"]
                ways.put(name, as_stored(weight, self.plan.dense))
        return reports

    def quantize(
        self, alike: Mapping[str, Linear], scheme: Scheme, seen: Seen, ways: TwoWays
    ) -> list[dict[str, Any]]:
        import torch

        options = self.plan.options
        first = next(iter(alike.values())).name
        weights = [ways.original[f"{name}.weight"] for name in alike]
        weight = torch.cat(weights)
        order = ordered(seen.hessian, first, act_order=scheme.act_order, damp=options.damp)
        form = options.checkpoint_format
        found = quantize(first, weight, seen.missing(weight), order, scheme, form)
        reports: list[dict[str, Any]] = []
        start = 0
        for (name, linear), rows in zip(alike.items(), map(len, weights), strict=True):
            part = slice(start, start + rows)
            start += rows
            ways.put(name, found.values[part].contiguous())
            for key, values in pack(found.tensor.columns(part), form).items():
                self.writer.put(f"{linear.name}.{key}", values)
            error = float(found.error[part].sum() / found.nearest[part].sum().clamp(min=1e-30))
            under = order.under
            report = TensorReport(
                linear.name, scheme.bits, scheme.group_size, under.damp, under.dead, error
            )
            reports.append(asdict(report))
        return reports

    def rest(self) -> None:
        """What belongs to no layer: embedding, last norm, head."""
        for tensor in self.plan.tensors:
            if not tensor.name.startswith("model.layers."):
                self.writer.put(
                    tensor.name, dense_data(self.checkpoint, tensor.name, self.plan.dense)
                )
        self.writer.sync()

    def distill(self, progress: Progress) -> distill.Report | None:
        """Tune what was written. The learned numbers are kept before they are put in place: a run
        that is killed between must not take its own for those that it started from."""
        options = self.plan.options.distill
        if options is None:
            return None
        options = replace(options, n_threads=self.threads, device=self.device)
        tuned = self.work.path / _TUNED

        def tell(what: str, done: int, total: int, ratio: float) -> None:
            share = (0.2 if what == "original" else 0.8) * done / total
            passed = share if what == "original" else 0.2 + share
            progress(_LAYERS_SHARE + (1 - _LAYERS_SHARE) * passed)

        def tune() -> dict[str, Any]:
            student = gptq_student.GptqStudent(self.plan, self.work.path, self.device)
            windows = _distilled_on(self.plan, self.ids)
            report = distill.train(
                self.work, self.checkpoint, student.parts, windows, options, tell
            )
            student.save(tuned)
            return report.to_json()

        report = distill.Report(**self.work.once("tuned", tune))
        self.work.once("tuned in place", lambda: gptq_student.put(tuned, self.writer))
        return report


def _distilled_on(plan: Plan, ids: Ids) -> Ids:
    n_tokens = plan.options.distill_tokens
    return ids if n_tokens is None else ids[: max(distill.LEAST_WINDOWS, n_tokens // ids.shape[1])]


def _disk_bytes(plan: Plan, ids: Ids) -> int:
    spec = plan.checkpoint.spec
    n_bytes = plan.size_bytes + TwoWays.disk_bytes(spec, ids.size)
    if plan.options.distill is not None:
        n_bytes += Teacher.disk_bytes(spec, _distilled_on(plan, ids).size)
    return n_bytes


def _not_the_source(checkpoint: HfCheckpoint | GgufCheckpoint, out: Path) -> None:
    if any(out in file.resolve().parents for file in source_files(checkpoint)):
        raise InputError(f"{out} holds the source itself; give another output")
