"""`dsq convert --to gptq`: a directory of GPTQ weights, one layer in memory, resumable by layer.

Each matrix makes up for its own errors and for those before it, as `compensate` does for GGUF: see
`two_ways`, `dsq.quant.solver`, and docs/fidelity.md. Embedding, norms, biases and head keep the
source's type.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsq.convert.atomic import check_space, os_error
from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
from dsq.convert.hf.quantized_dir import (
    DirectoryWriter,
    OutTensor,
    check_output,
    dense_data,
    dense_tensor,
    dense_type,
    model_files,
)
from dsq.convert.names import expected_tensors
from dsq.convert.pipeline import source_files
from dsq.errors import InputError
from dsq.quant.gptq import Scheme, ordered, quantize
from dsq.quant.gptq_layout import Format, GptqTensor, pack, part_shapes
from dsq.quant.scheme import BF16, GgmlType
from dsq.quant.solver import DAMP
from dsq.quant.threads import default_threads
from dsq.runtime.calibration.workdir import WorkDir, settings_hash
from dsq.runtime.decoder import STAGES, chosen_device, read_layer, read_tensor
from dsq.runtime.fidelity.source_check import check_weights, source_identity
from dsq.runtime.fidelity.two_ways import Seen, TwoWays
from dsq.runtime.torch_engine import require_torch

if TYPE_CHECKING:
    from torch import Tensor

_EMBEDDING = "model.embed_tokens.weight"
_LINEARS = tuple(name for names in STAGES.values() for name in names)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Override:
    """What a matrix whose module's name starts with a match of `pattern` has instead; None: it is
    left as it is. The first of several wins, as in GPTQModel's `dynamic`."""

    pattern: str
    bits: int | None
    group_size: int | None = None


@dataclass(frozen=True)
class Options:
    """`damp`: what is added to a Hessian's diagonal, as a share of its mean."""

    scheme: Scheme
    checkpoint_format: Format = "gptq"
    dynamic: tuple[Override, ...] = ()
    allow_ragged: bool = False
    damp: float = DAMP
    n_threads: int | None = None
    device: str = "auto"  # or "cpu", "cuda"


@dataclass(frozen=True)
class Linear:
    """A matrix of a layer: Hugging Face's name of its module, (n_out, n_in), and its scheme (None:
    it is left as it is)."""

    name: str
    shape: tuple[int, int]
    scheme: Scheme | None

    def tensors(self, dense: GgmlType) -> list[OutTensor]:
        n_out, n_in = self.shape
        if self.scheme is None:
            return [dense_tensor(f"{self.name}.weight", self.shape, dense)]
        shapes = part_shapes(n_in, n_out, self.scheme.n_groups(n_in), self.scheme.bits)
        types = {"scales": "F16"}
        return [
            OutTensor(f"{self.name}.{part}", types.get(part, "I32"), shape)
            for part, shape in shapes.items()
        ]


@dataclass(frozen=True, eq=False)
class Plan:
    """All that is decided before anything is read or written."""

    checkpoint: HfCheckpoint | GgufCheckpoint
    options: Options
    dense: GgmlType  # the type of what is not quantized
    linears: Mapping[str, Linear]  # by module name
    tensors: tuple[OutTensor, ...]  # in the directory's order

    @property
    def size_bytes(self) -> int:
        return sum(t.n_bytes for t in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits a weight of the quantized matrices, scales and all."""
        quantized = [linear for linear in self.linears.values() if linear.scheme]
        n_bytes = sum(t.n_bytes for linear in quantized for t in linear.tensors(self.dense))
        return 8 * n_bytes / max(1, sum(q.shape[0] * q.shape[1] for q in quantized))


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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan_gptq(checkpoint: HfCheckpoint | GgufCheckpoint, options: Options) -> Plan:
    """Decide each matrix's scheme. Raises InputError for shapes that it does not fit, and for a
    quantized source."""
    dense = dense_type(checkpoint)
    linears: dict[str, Linear] = {}
    tensors: list[OutTensor] = []
    used: set[Override] = set()
    for name, shape in expected_tensors(checkpoint.spec).items():
        module = name.removesuffix(".weight")
        if not module.endswith(_LINEARS) or name == module:
            tensors.append(dense_tensor(name, shape, dense))
            continue
        n_out, n_in = shape
        override = _override(module, options.dynamic)
        used.update([override] if override else [])
        scheme = _scheme(options.scheme, override)
        if scheme is not None:
            scheme.check(module, n_in, n_out, allow_ragged=options.allow_ragged)
        linears[module] = Linear(module, (n_out, n_in), scheme)
        tensors += linears[module].tensors(dense)
    idle = [o.pattern for o in options.dynamic if o not in used]
    if idle:
        raise InputError(
            f"--dynamic {idle[0]}: no matrix's name starts so, or an earlier one takes all; names "
            "are like model.layers.0.mlp.down_proj"
        )
    return Plan(checkpoint, options, dense, linears, tuple(tensors))


def _override(module: str, dynamic: Sequence[Override]) -> Override | None:
    return next((o for o in dynamic if re.match(o.pattern, module)), None)


def _scheme(base: Scheme, override: Override | None) -> Scheme | None:
    if override is None:
        return base
    if override.bits is None:
        return None
    group_size = base.group_size if override.group_size is None else override.group_size
    return replace(base, bits=override.bits, group_size=group_size)


def convert(
    plan: Plan,
    ids: npt.NDArray[np.int32],
    out: Path,
    *,
    force: bool = False,
    pre: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Calibrate on the windows `ids` (windows, n_ctx), and write the directory `out`.

    A run that was killed goes on after the layers that it finished, to the same bytes. Raises
    InputError for an output that exists (unless `force`) or is being written, a disk too small and
    damaged weights.
    """
    checkpoint, options = plan.checkpoint, plan.options
    require_torch(checkpoint.path)
    out = out.resolve()
    check_output(out, force=force)
    _not_the_source(checkpoint, out)
    device = chosen_device(options.device)
    threads = options.n_threads or default_threads()
    files = model_files(checkpoint, plan.dense, quantization_config(plan), pre=pre)
    files["quantize_config.json"] = quantization_config(plan)
    start = time.perf_counter()
    settings = settings_hash(
        source_identity(checkpoint),
        [version(name) for name in ("dsq", "torch")],
        *(options, plan.tensors, files, ids, device, threads),
    )
    try:
        with WorkDir(out, settings) as work:
            resumed = min(work.done, checkpoint.spec.n_layer)
            if not resumed:
                check_space(out, plan.size_bytes + TwoWays.disk_bytes(checkpoint.spec, ids.size))
                check_weights(checkpoint, {t.name for t in plan.tensors}, plan.dense)
            with DirectoryWriter(work.path, out, plan.tensors) as writer:
                reports = _Run(plan, ids, device, threads, work, writer).go(progress)
                ready = writer.complete(files, force=force)
            work.finish(ready, out)
    except OSError as error:
        raise os_error(error, out) from error
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
    )


def quantization_config(plan: Plan) -> dict[str, Any]:
    """What quantize_config.json and config.json's key hold, in GPTQModel's spelling."""
    options, scheme = plan.options, plan.options.scheme
    quantizer = [f"dsq:{version('dsq')}"]
    if not scheme.sym:
        # GPTQModel loads zero points of format `gptq` only with its own mark that none wraps.
        quantizer.append("gptqmodel:0.9.0")
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "desc_act": scheme.act_order,
        "sym": scheme.sym,
        "static_groups": scheme.static_groups,
        "lm_head": False,
        "checkpoint_format": options.checkpoint_format,
        "pack_dtype": "int32",
        "damp_percent": options.damp,
        "true_sequential": True,
        "meta": {
            "quantizer": quantizer,
            "damp_percent": options.damp,
            "static_groups": scheme.static_groups,
            "true_sequential": True,
        },
    }
    if options.dynamic:
        config["dynamic"] = {
            f"-:{o.pattern}" if o.bits is None else f"+:{o.pattern}": {
                key: value
                for key, value in (("bits", o.bits), ("group_size", o.group_size))
                if value is not None
            }
            for o in options.dynamic
        }
    return config


class _Run:
    """The layers that are left, one by one."""

    def __init__(
        self,
        plan: Plan,
        ids: npt.NDArray[np.int32],
        device: str,
        threads: int,
        work: WorkDir,
        writer: DirectoryWriter,
    ) -> None:
        self.plan, self.ids, self.device = plan, ids, device
        self.threads, self.work, self.writer = threads, work, writer
        self.checkpoint = plan.checkpoint

    def go(self, progress: Progress) -> list[dict[str, Any]]:
        import torch

        n_layer = self.checkpoint.spec.n_layer
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            done = min(self.work.done, n_layer)
            with TwoWays(
                self.checkpoint.spec, self.ids, self.work.path, self.device, layer=done
            ) as ways:
                reports = []
                for layer in range(n_layer):
                    reports += self.work.once(f"layer {layer}", partial(self.layer, layer, ways))
                    progress(layer + 1, n_layer)
        finally:
            torch.set_num_threads(before)
        self.work.once("rest", self.rest)
        return reports

    def layer(self, layer: int, ways: TwoWays) -> list[dict[str, Any]]:
        prefix = f"model.layers.{layer}."
        if layer == 0:
            embedding = read_tensor(self.checkpoint, _EMBEDDING)
            ways.embed(embedding, _as_stored(embedding, self.plan.dense))
        weights = read_layer(self.checkpoint, layer, self.device)
        ways.enter(weights)
        for name, values in weights.items():
            if name.removesuffix(".weight") not in _LINEARS:
                ways.stored[name] = _as_stored(values, self.plan.dense)
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
                ways.put(name, _as_stored(weight, self.plan.dense))
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
            for key, values in pack(_outputs(found.tensor, part), form).items():
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


def _outputs(tensor: GptqTensor, part: slice) -> GptqTensor:
    """Some of the outputs of a matrix."""
    return replace(
        tensor,
        codes=tensor.codes[:, part],
        zeros=tensor.zeros[:, part],
        scales=tensor.scales[:, part],
    )


def _as_stored(weight: Tensor, to: GgmlType) -> Tensor:
    return (weight.bfloat16() if to is BF16 else weight.half()).float()


def _not_the_source(checkpoint: HfCheckpoint | GgufCheckpoint, out: Path) -> None:
    if any(out in file.resolve().parents for file in source_files(checkpoint)):
        raise InputError(f"{out} holds the source itself; give another output")
