"""`dsq convert --to exl2`: a directory of EXL2 weights, one layer in memory, resumable by layer.

First the candidates of every matrix are measured (`exl2_measure`), then a scheme is chosen for each
under the target (`dsq.quant.exl2_search`), then the matrices are quantized as `compensate` does it
for GGUF: each makes up for its own errors and for those before it. Embedding, norms and biases are
f16, as in exllamav2's own files.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsq.convert.atomic import check_space, os_error, write_text
from dsq.convert.hf.quantized_dir import (
    DirectoryWriter,
    check_output,
    dense_data,
    model_files,
)
from dsq.convert.hf.shards import OutTensor
from dsq.convert.names import expected_tensors
from dsq.convert.pipeline import source_files
from dsq.errors import DsqError, InputError
from dsq.quant.exl2 import Order, Scheme, ordered, padded, quantize
from dsq.quant.exl2_layout import pack
from dsq.quant.exl2_measurement import Measurement
from dsq.quant.exl2_search import allocate
from dsq.quant.scheme import F16
from dsq.quant.stats import Stats
from dsq.quant.threads import default_threads, torch_threads
from dsq.runtime.calibration.borders import Border
from dsq.runtime.calibration.moments import Moments
from dsq.runtime.calibration.workdir import WorkDir, settings_hash
from dsq.runtime.decoder import STAGES, Decoder, chosen_device, read_layer, read_tensor
from dsq.runtime.fidelity.exl2_measure import Setup, measure
from dsq.runtime.fidelity.exl2_plan import HEAD, LINEARS, Options, Plan
from dsq.runtime.fidelity.source_check import check_weights, source_identity
from dsq.runtime.fidelity.two_ways import BATCH_TOKENS, Seen, TwoWays
from dsq.runtime.reference_cache import file_identity
from dsq.runtime.torch_engine import require_torch

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int, int], None]

FORMAT = "0.3.2"  # the exllamav2 whose layout this is
MEASUREMENT = "measurement.json"
_EMBEDDING, _NORM = "model.embed_tokens.weight", "model.norm.weight"


@dataclass(frozen=True)
class TensorReport:
    """How one matrix came out: bits a weight, and its runs of [bits, rows, group]."""

    name: str
    bpw: float
    runs: list[list[int]]
    damp: float
    dead_channels: int


@dataclass(frozen=True)
class Report:
    """`bpw` is of the layers' matrices, `file_bpw` of all that is in the files."""

    out: str
    size_bytes: int
    bpw: float
    file_bpw: float
    predicted_kld: float | None  # of the layers; None for exllamav2's measurement
    head_bits: int
    n_tokens: int
    resumed_steps: int  # done by an earlier run
    measure_seconds: float
    seconds: float
    device: str
    n_threads: int
    tensors: tuple[TensorReport, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def convert(
    plan: Plan,
    ids: npt.NDArray[np.int32],
    out: Path,
    *,
    about_text: Mapping[str, Any] | None = None,
    stats: Stats | None = None,
    force: bool = False,
    pre: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Measure and quantize on the windows `ids` (windows, n_ctx), and write the directory `out`.

    `stats` of the same windows spare the measurement's passes where they hold Hessians and
    gradients. A run that was killed goes on after the layers that it finished, to the same bytes.
    Raises InputError for a target out of reach, an output that exists (unless `force`) or is being
    written, a disk too small and damaged weights.
    """
    checkpoint, options = plan.checkpoint, plan.options
    require_torch(checkpoint.path)
    out = out.resolve()
    check_output(out, force=force or WorkDir.owns(out))
    if any(out in file.resolve().parents for file in source_files(checkpoint)):
        raise InputError(f"{out} holds the source itself; give another output")
    device = chosen_device(options.device)
    threads = options.n_threads or default_threads()
    calibration = {
        "rows": len(ids),
        "length": ids.shape[1],
        "dataset": str((about_text or {}).get("name", "")),
    }
    files = model_files(checkpoint, F16, _quantization_config(options, calibration), pre=pre)
    if plan.head is not None:  # the embedding stays f16: they are no longer one matrix
        files["config.json"]["tie_word_embeddings"] = False
    read = plan.measurement.to_json() if plan.measurement else None
    settings = settings_hash(
        source_identity(checkpoint),
        file_identity([stats.path]) if stats else None,
        [version(name) for name in ("dsq", "torch")],
        *(options, files, read, ids, device, threads),
    )
    start = time.perf_counter()
    tell = _Steps(checkpoint.spec.n_layer * (1 if plan.measurement else 2) + 1, progress)
    try:
        with WorkDir(out, settings) as work, torch_threads(threads):
            resumed = work.done
            if not resumed:
                check_space(out, _disk_bytes(plan, ids.size))
                check_weights(checkpoint, plan.dense, F16)
            measurement = plan.measurement
            if measurement is None:
                setup = Setup(checkpoint, ids, stats, options.damp, device, threads)
                measurement = measure(setup, work, calibration, tell)
            measured = time.perf_counter()
            chosen = work.once("allocation", partial(_allocated, plan, measurement, work, out))
            schemes = {name: Scheme.from_json(runs) for name, runs in chosen["schemes"].items()}
            tensors = plan.tensors(schemes)
            with DirectoryWriter(work.path, out, tensors) as writer:
                run = _Run(plan, schemes, tensors, ids, device, work, writer)
                reports = run.go(tell, before=chosen["steps"])
                ready = writer.complete({**files, MEASUREMENT: measurement.to_json()}, force=force)
            work.finish(ready, out)
    except OSError as error:
        raise os_error(error, out) from error
    n_values = sum(prod(shape) for shape in expected_tensors(checkpoint.spec).values())
    return Report(
        out=str(out),
        size_bytes=sum(file.stat().st_size for file in out.iterdir()),
        bpw=round(chosen["bpw"], 4),
        file_bpw=round(8 * sum(t.n_bytes for t in tensors) / n_values, 4),
        predicted_kld=chosen["error"] if measurement.theirs is None else None,
        head_bits=options.head_bits,
        n_tokens=ids.size,
        resumed_steps=resumed,
        measure_seconds=round(measured - start, 3),
        seconds=round(time.perf_counter() - start, 3),
        device=device,
        n_threads=threads,
        tensors=tuple(TensorReport(**report) for report in reports),
    )


def _quantization_config(options: Options, calibration: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "quant_method": "exl2",
        "version": FORMAT,
        "bits": options.bpw,
        "head_bits": options.head_bits,
        "calibration": dict(calibration),
    }


def _disk_bytes(plan: Plan, n_tokens: int) -> int:
    """The directory, and the hidden states of both passes."""
    spec = plan.checkpoint.spec
    measured = 0 if plan.measurement else 3 * 4 * n_tokens * spec.n_embd
    return plan.size_bytes + TwoWays.disk_bytes(spec, n_tokens) + measured


def _allocated(plan: Plan, measurement: Measurement, work: WorkDir, out: Path) -> dict[str, Any]:
    """The choice; `steps`: how many are done with it, and come before the layers.

    Without one, the measurement of this run is kept beside `out`.
    """
    try:
        found = allocate(measurement.options, plan.n_weights, plan.options.bpw)
    except DsqError as error:
        if plan.measurement is not None:
            raise
        kept = out.with_name(f"{out.name}.{MEASUREMENT}")
        write_text(kept, json.dumps(measurement.to_json()))
        raise type(error)(f"{error}; what was measured is kept: --measurement {kept}") from error
    schemes = {name: scheme.to_json() for name, scheme in found.schemes.items()}
    steps = work.done + 1
    return {"schemes": schemes, "bpw": found.bpw, "error": found.error, "steps": steps}


class _Steps:
    """Tells a progress of so many steps, one a call."""

    def __init__(self, total: int, progress: Progress) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def __call__(self) -> None:
        self.done += 1
        self.progress(self.done, self.total)


class _Run:
    """The layers and the head that are left, one by one."""

    def __init__(
        self,
        plan: Plan,
        schemes: Mapping[str, Scheme],
        tensors: Sequence[OutTensor],
        ids: npt.NDArray[np.int32],
        device: str,
        work: WorkDir,
        writer: DirectoryWriter,
    ) -> None:
        self.plan, self.schemes, self.ids = plan, schemes, ids
        self.device, self.work, self.writer = device, work, writer
        self.checkpoint, self.spec = plan.checkpoint, plan.checkpoint.spec
        self.dense = [t.name for t in tensors if t.name.endswith((".weight", ".bias"))]

    def go(self, tell: Callable[[], None], *, before: int) -> list[dict[str, Any]]:
        """`before`: steps of the work folder that came before the layers."""
        n_layer = self.spec.n_layer
        done = min(self.work.done - before, n_layer)
        reports = []
        with TwoWays(self.spec, self.ids, self.work.path, self.device, layer=done) as ways:
            for layer in range(n_layer):
                reports += self.work.once(f"layer {layer}", partial(self.layer, layer, ways))
                tell()
        reports += self.work.once("rest", self.rest)
        tell()
        return reports

    def layer(self, layer: int, ways: TwoWays) -> list[dict[str, Any]]:
        prefix = f"model.layers.{layer}."
        if layer == 0:
            embedding = read_tensor(self.checkpoint, _EMBEDDING)
            ways.embed(embedding, embedding.half().float())
        weights = read_layer(self.checkpoint, layer, self.device)
        ways.enter(weights)
        for name, values in weights.items():
            if name.removesuffix(".weight") not in LINEARS:
                ways.stored[name] = values.half().float()
        reports: list[dict[str, Any]] = []
        for stage, names in STAGES.items():
            seen = ways.see(stage)
            order = ordered(seen.hessian, prefix + names[0], self.plan.options.damp)
            for name in names:
                weight = ways.original[f"{name}.weight"]
                scheme = self.schemes[prefix + name]
                values, report = self.put(prefix + name, weight, order, scheme, seen)
                ways.put(name, values)
                reports.append(report)
        ways.leave()
        self.put_dense([name for name in self.dense if name.startswith(prefix)])
        ways.sync()
        self.writer.sync()
        return reports

    def put(
        self, name: str, weight: Tensor, order: Order, scheme: Scheme, seen: Seen
    ) -> tuple[Tensor, dict[str, Any]]:
        """Quantize and write one matrix: its values, and its report."""
        found = quantize(name, weight, order, scheme, seen.missing(weight))
        for part, data in pack(found.tensor).items():
            self.writer.put(f"{name}.{part}", data)
        n_out, n_in = weight.shape
        bits = scheme.total_bits(n_out, bias=name in self.plan.biased)
        bpw = round(bits / (padded(n_out) * n_in), 4)
        report = TensorReport(name, bpw, scheme.to_json(), order.under.damp, order.under.dead)
        return found.values, asdict(report)

    def rest(self) -> list[dict[str, Any]]:
        """What belongs to no layer: embedding, last norm, head."""
        self.put_dense([name for name in self.dense if not name.startswith("model.layers.")])
        reports = []
        if self.plan.head is not None:
            source = _EMBEDDING if self.spec.tied else f"{HEAD}.weight"
            weight = read_tensor(self.checkpoint, source, self.device)
            seen = self.head_input()
            order = ordered(seen.hessian, HEAD, self.plan.options.damp)
            reports = [self.put(HEAD, weight, order, self.plan.head, seen)[1]]
        self.writer.sync()
        return reports

    def head_input(self) -> Seen:
        """As `TwoWays.see`, for the last layer's normalized output."""
        import torch

        norm = read_tensor(self.checkpoint, _NORM, self.device)
        kept = norm.half().float()
        graph = Decoder(self.spec, 1, self.device)
        moments = Moments(self.spec.n_embd, self.device, hessian=True)
        drift = torch.zeros(self.spec.n_embd, self.spec.n_embd, device=self.device)
        shape = (len(self.ids), self.ids.shape[1], self.spec.n_embd)
        at, size = self.spec.n_layer % 2, max(1, BATCH_TOKENS // self.ids.shape[1])
        with (
            torch.inference_mode(),
            Border(self.work.path / f"original-{at}", shape) as theirs,
            Border(self.work.path / f"stored-{at}", shape) as ours,
        ):
            for start in range(0, len(self.ids), size):
                n = min(size, len(self.ids) - start)
                x = graph.output_in(kept, ours.read(start, n).to(self.device))
                other = graph.output_in(norm, theirs.read(start, n).to(self.device))
                moments.add(x)
                drift.addmm_((other - x).flatten(0, -2).T, x.flatten(0, -2))
        hessian = moments.hessian()
        assert hessian is not None, "asked for"
        return Seen(torch.from_numpy(hessian).to(self.device), drift=drift / self.ids.size)

    def put_dense(self, names: Sequence[str]) -> None:
        for name in names:
            self.writer.put(name, dense_data(self.checkpoint, name, F16))
