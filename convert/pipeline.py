"""Carrying a plan out: source tensors → jobs → slabs → artifact."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsq.convert.atomic import check_target
from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
from dsq.convert.gguf.metadata import (
    QUANTIZATION_VERSION,
    STRING,
    U32,
    KeyValue,
    copied_entries,
    model_entries,
    vocabulary_entries,
)
from dsq.convert.gguf.writer import GgufLayout, OutTensor, gguf_layout, shard_paths, write_gguf
from dsq.convert.imatrix import Imatrix
from dsq.convert.tensor_plan import (
    TensorStep,
    interleaved_rows,
    plan_from_gguf,
    plan_from_hf,
    row_weights,
)
from dsq.convert.verify_tensors import METHOD
from dsq.errors import InputError
from dsq.quant.plan import Options
from dsq.quant.presets import PRESETS, Preset
from dsq.quant.scheme import F32
from dsq.quant.stream import Job, quantize_stream
from dsq.quant.threads import default_threads

_OURS, _IMATRIX = "dsq.quantize.", "quantize.imatrix."

Progress = Callable[[int], None]
Made = Callable[[TensorStep], "npt.NDArray[np.uint8] | None"]
"""Asked for each step in turn: its rows as they shall be stored, or None to make them here."""


def plain(step: TensorStep) -> None:
    """The `Made` that leaves everything to the stream."""


@dataclass(frozen=True)
class GgufPlan:
    """All that is decided before anything is written."""

    preset: Preset
    steps: tuple[TensorStep, ...]
    layout: GgufLayout
    imatrix: Imatrix | None

    @property
    def n_params(self) -> int:
        return sum(int(np.prod(s.shape)) for s in self.steps if s.source)

    @property
    def bpw(self) -> float:
        return 8 * sum(s.n_bytes for s in self.steps) / self.n_params

    def to_json(self) -> dict[str, Any]:
        return {
            "type": self.preset.name,
            "n_params": self.n_params,
            "size_bytes": self.layout.data_bytes,
            "bpw": round(self.bpw, 4),
            "shards": len(self.layout.shards),
            "tensors_by_type": dict(Counter(s.to.name for s in self.steps)),
            "tensors": [s.to_json() for s in self.steps],
        }


@dataclass(frozen=True)
class Artifact:
    """What was written."""

    paths: tuple[Path, ...]
    size_bytes: int
    seconds: float


def plan_gguf(
    checkpoint: HfCheckpoint | GgufCheckpoint,
    preset: Preset,
    *,
    options: Options | None = None,
    imatrix: Imatrix | None = None,
    allow_requantize: bool = False,
    split_max_bytes: int | None = None,
    pre: str | None = None,
) -> GgufPlan:
    """Decide every tensor and every key of the GGUF that `preset` makes of `checkpoint`."""
    spec = checkpoint.spec
    if isinstance(checkpoint, HfCheckpoint):
        if checkpoint.packed is not None and preset.base.is_quantized and not allow_requantize:
            raise InputError(
                f"{checkpoint.path} is {checkpoint.packed.method} already: quantizing it again to "
                f"{preset.name} loses more than quantizing the original; keep its codes (dsq "
                f"convert --to gguf, no --outtype), or --allow-requantize"
            )
        steps = plan_from_hf(spec, checkpoint.tensors, preset, options, imatrix)
        n_params = sum(t.n_elements for t in checkpoint.tensors.values())
        entries = model_entries(
            spec, name=model_name(checkpoint.path), n_params=n_params, file_type=preset.ftype
        ) + vocabulary_entries(checkpoint.vocabulary(pre=pre))
    else:
        gguf = checkpoint.gguf
        steps = plan_from_gguf(
            spec, checkpoint.tensors, preset, options, imatrix, allow_requantize=allow_requantize
        )
        replaced = [
            KeyValue("general.quantization_version", QUANTIZATION_VERSION, U32),
            KeyValue("general.file_type", preset.ftype, U32),
        ]
        if pre is not None:
            name = checkpoint.vocabulary(pre=pre).pre  # checked
            replaced.append(KeyValue("tokenizer.ggml.pre", name, STRING))
        entries = copied_entries(gguf.metadata, gguf.metadata_types, replaced)
    if imatrix:
        entries += _imatrix_entries(imatrix)
    tensors = [OutTensor(s.name, s.shape, s.to, s.n_bytes) for s in steps]
    return GgufPlan(preset, steps, gguf_layout(entries, tensors, split_max_bytes), imatrix)


def with_method(plan: GgufPlan, method: str, *, text: str = "", n_tokens: int = 0) -> GgufPlan:
    """The plan, with how its weights come to be among the file's keys: they are no plain rounding
    of the source's, which `verify` has to know.

    `text` names what they were calibrated on, if it is known. No importance matrix weighs what is
    "compensated": it has only a say in the types.
    """
    entries = [entry for entry in plan.layout.entries if not entry.key.startswith(_OURS)]
    if "compensated" in method.split("+"):
        entries = [entry for entry in entries if not entry.key.startswith(_IMATRIX)]
        plan = replace(plan, imatrix=None)
    entries += method_entries(method, text, n_tokens)
    return replace(plan, layout=replace(plan.layout, entries=tuple(entries)))


def method_entries(method: str, text: str, n_tokens: int) -> list[KeyValue]:
    """See `with_method`."""
    entries = [KeyValue(METHOD, method, STRING)]
    if text:
        entries.append(KeyValue(f"{_OURS}dataset", text, STRING))
    if n_tokens:
        entries.append(KeyValue(f"{_OURS}tokens", n_tokens, U32))
    return entries


def file_preset(checkpoint: HfCheckpoint | GgufCheckpoint) -> Preset | None:
    """The preset that a GGUF says it was made with (general.file_type)."""
    if isinstance(checkpoint, HfCheckpoint):
        return None
    number = checkpoint.gguf.metadata.get("general.file_type")
    return next((p for p in PRESETS.values() if p.ftype == number), None)


def _imatrix_entries(imatrix: Imatrix) -> list[KeyValue]:
    entries = [KeyValue("quantize.imatrix.file", str(imatrix.path), STRING)]
    if imatrix.datasets:
        entries.append(KeyValue("quantize.imatrix.dataset", imatrix.datasets[0], STRING))
    entries.append(KeyValue("quantize.imatrix.entries_count", len(imatrix.values), U32))
    if imatrix.n_chunks > 0:
        entries.append(KeyValue("quantize.imatrix.chunks_count", imatrix.n_chunks, U32))
    return entries


def run_gguf_plan(
    checkpoint: HfCheckpoint | GgufCheckpoint,
    plan: GgufPlan,
    out: Path,
    *,
    force: bool = False,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    progress: Progress = lambda n: None,
    made: Made = plain,
) -> Artifact:
    """Write the artifact. Raises InputError for bad weights or a bad target."""
    start = time.perf_counter()
    check_outputs(checkpoint, plan, out, force=force)
    slabs = quantize_stream(
        gguf_jobs(checkpoint, plan.steps, plan.imatrix, made),
        threads=threads or default_threads(),
        allow_nonfinite=allow_nonfinite,
    )
    paths = write_gguf(out, plan.layout, slabs, progress)
    return Artifact(tuple(paths), sum(p.stat().st_size for p in paths), time.perf_counter() - start)


def check_outputs(
    checkpoint: HfCheckpoint | GgufCheckpoint, plan: GgufPlan, out: Path, *, force: bool
) -> None:
    """Refuse an output that is the source, exists (unless `force`) or has no room."""
    sources = {p.resolve() for p in source_files(checkpoint)}
    for path in shard_paths(out, len(plan.layout.shards)):
        if path.resolve() in sources:
            raise InputError(f"{path} is the source itself; give another output")
        check_target(path, force=force, n_bytes=plan.layout.data_bytes)


def gguf_jobs(
    checkpoint: HfCheckpoint | GgufCheckpoint,
    steps: Sequence[TensorStep],
    imatrix: Imatrix | None = None,
    made: Made = plain,
) -> Iterator[Job]:
    """One job a step, opened only when its turn comes."""
    for step in steps:
        rows = made(step)
        if rows is not None:
            yield Job(step.name, rows, step.to, step.to, step.shape[-1])
            continue
        if step.source is None:
            factors = checkpoint.spec.rope.freq_factors(checkpoint.spec.head_dim)
            raw = factors.astype(np.float32).view(np.uint8).reshape(1, -1)
            yield Job(step.name, raw, F32, F32, step.shape[-1])
            continue
        data = checkpoint.data(step.source.name)
        # The values of a permuted bias move one by one: each is a row of its own.
        n_per_row = 1 if step.heads and len(step.shape) == 1 else step.source.n_per_row
        raw = data.reshape(-1, step.stored.row_bytes(n_per_row))
        order = interleaved_rows(len(raw), step.heads) if step.heads else None
        yield Job(
            step.name, raw, step.stored, step.to, n_per_row, order, row_weights(step, imatrix)
        )


def source_files(checkpoint: HfCheckpoint | GgufCheckpoint) -> set[Path]:
    if isinstance(checkpoint, HfCheckpoint):
        return checkpoint.files
    return {t.path for t in checkpoint.tensors.values()}


def model_name(path: Path) -> str:
    """`general.name`: the directory's name, as llama.cpp's converter takes it.

    Not resolved: the hub's cache links files to their hashes. A snapshot in it is called by its
    commit; there the repository's name is meant.
    """
    path = Path(os.path.normpath(Path.cwd() / path))
    if path.is_dir() and path.parent.name == "snapshots":
        return path.parent.parent.name.split("--")[-1]
    return path.name or "model"
