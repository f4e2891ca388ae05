"""GPTQ and EXL2 directories → GGUF: the same codes in ggml's blocks where the grids coincide.

Nothing is rounded again then. Where a matrix has no such place (act-order's scattered groups,
asymmetric 8 bits, EXL2) it is dequantized and stored in a richer type, and the difference is
measured. See `dsq.quant.gptq_blocks` for what coincides with what.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsq.convert.checkpoint import GATHERED, HfCheckpoint
from dsq.convert.gguf.metadata import model_entries, vocabulary_entries
from dsq.convert.gguf.writer import OutTensor, gguf_layout, write_gguf
from dsq.convert.gptq.reader import GptqLinears
from dsq.convert.packed import PackedLinears
from dsq.convert.pipeline import (
    Artifact,
    GgufPlan,
    Progress,
    check_outputs,
    gguf_jobs,
    model_name,
    with_method,
)
from dsq.convert.repack_jobs import Difference, Made, Recipe, repacked
from dsq.convert.tensor_plan import TensorStep, interleaved_rows, plan_from_hf
from dsq.convert.verify_tensors import release
from dsq.errors import InputError
from dsq.quant.gptq_blocks import Q8_0, RUN, block_type, largest_scale_difference, run_groups
from dsq.quant.presets import PRESETS
from dsq.quant.scheme import F16, F32, FLOAT_TYPES, GgmlType
from dsq.quant.stream import Job, quantize_stream
from dsq.quant.threads import default_threads


@dataclass(frozen=True)
class Choice:
    """How one packed matrix gets into the GGUF.

    `largest` bounds the difference of a weight before anything is written; None where it has to
    be measured. `why` is for people, where the codes cannot stay.
    """

    source: str  # "gptq 4-bit"
    recipe: Recipe
    to: GgmlType
    largest: float | None
    why: str = ""

    @property
    def is_exact(self) -> bool:
        return self.largest == 0


@dataclass(frozen=True)
class RepackPlan:
    """`checkpoint` is the source, its channels gathered where that helped; `choices` by the
    GGUF's names."""

    checkpoint: HfCheckpoint
    gguf: GgufPlan
    choices: Mapping[str, Choice]

    @property
    def is_exact(self) -> bool:
        return all(choice.is_exact for choice in self.choices.values())


def plan_repack(
    checkpoint: HfCheckpoint,
    *,
    exact: bool = False,
    gather: bool = True,
    to: GgmlType | None = None,
    split_max_bytes: int | None = None,
    pre: str | None = None,
) -> RepackPlan:
    """Decide each matrix's type. Reads the groups and zero points, no codes.

    `to` is the type of what cannot keep its codes; without it: q8_0, and f16 for 8 bits, EXL2 and
    rows that are no multiple of 32. `exact` refuses all that is not the same number afterwards
    (f32 holds everything). `gather` permutes inner channels: see `GptqLinears.gathered`.
    """
    if checkpoint.packed is None:
        raise InputError(f"{checkpoint.path}: is neither GPTQ nor EXL2; nothing to repack")
    gathered = checkpoint.gathered() if gather else checkpoint
    packed = gathered.packed
    assert packed is not None
    choices: dict[str, Choice] = {}
    steps = []
    for step in plan_from_hf(gathered.spec, gathered.tensors, PRESETS["f32"]):
        assert step.source is None or step.to is F32
        if step.source is not None and step.source.name in packed.tensors:
            choice = _choice(packed, step.source.name, to)
            if exact and not choice.is_exact:
                raise InputError(
                    f"{checkpoint.path}: {step.source.name.removesuffix('.weight')} "
                    f"({choice.source}) cannot become {choice.to} without a difference: "
                    f"{choice.why}; leave out --exact, or take --outtype f32"
                )
            choices[step.name] = choice
            steps.append(replace(step, to=choice.to))
        elif step.source is not None and len(step.shape) > 1:
            steps.append(replace(step, to=step.stored))  # as it is
        else:
            steps.append(step)
    plan = _gguf_plan(gathered, steps, split_max_bytes, pre)
    if gathered is not checkpoint:
        plan = with_method(plan, GATHERED)
    return RepackPlan(gathered, plan, choices)


def _choice(packed: PackedLinears, name: str, to: GgmlType | None) -> Choice:
    """See `plan_repack`."""
    kind, n_in = packed.kind(name), packed.tensors[name].shape[-1]
    why, rich = "its groups are of several widths and permuted", F16
    if isinstance(packed, GptqLinears):
        zeros, g_idx = packed.zeros(name), packed.g_idx(name)
        found = block_type(zeros, packed.bits(name))
        if n_in % RUN:
            why = f"rows of {n_in} are no blocks of {RUN}"
        elif run_groups(g_idx) is None:
            why = "act-order scatters its groups over the inputs"
            if (g_idx[1:] >= g_idx[:-1]).all():
                why = f"its groups are no whole blocks of {RUN} inputs"
            rich = Q8_0 if packed.bits(name) < 8 else F16
        elif found is None:
            why = "its zero points are not in the middle, and no type of 8 bits has them"
        else:
            largest = largest_scale_difference(
                packed.read_part(name, "scales"), zeros, packed.bits(name), found
            )
            why = "" if largest == 0 else "f16 rounds its minimums or scales"
            return Choice(kind, Recipe.CODES, found, largest, why)
    to = to or rich
    if n_in % to.block_size:
        raise InputError(f"{name}: rows of {n_in} do not divide into {to} blocks; take f16 or f32")
    return Choice(kind, Recipe.ROUNDED, to, 0.0 if to is F32 else None, why)


def _gguf_plan(
    checkpoint: HfCheckpoint,
    steps: list[TensorStep],
    split_max_bytes: int | None,
    pre: str | None,
) -> GgufPlan:
    """The plan of a file that is called by the type of most of its weights."""
    counts: Counter[str] = Counter()
    for step in steps:
        if len(step.shape) > 1:
            counts[step.to.name] += step.shape[0] * step.shape[1]
    base = counts.most_common(1)[0][0]
    preset = PRESETS[base] if base in PRESETS else PRESETS["f32"]
    n_params = sum(t.n_elements for t in checkpoint.tensors.values())
    entries = model_entries(
        checkpoint.spec,
        name=model_name(checkpoint.path),
        n_params=n_params,
        file_type=preset.ftype,
    ) + vocabulary_entries(checkpoint.vocabulary(pre=pre))
    tensors = [OutTensor(s.name, s.shape, s.to, s.n_bytes) for s in steps]
    return GgufPlan(preset, tuple(steps), gguf_layout(entries, tensors, split_max_bytes), None)


def run_repack(
    plan: RepackPlan,
    out: Path,
    *,
    force: bool = False,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    progress: Progress = lambda n: None,
) -> tuple[Artifact, dict[str, Any]]:
    """Write the GGUF. Returns it and the receipt: see `receipt`.

    `allow_nonfinite`: of what is stored dense; packed scales must be finite.
    """
    start = time.perf_counter()
    threads = threads or default_threads()
    check_outputs(plan.checkpoint, plan.gguf, out, force=force)
    differences: dict[str, Difference] = {}
    slabs = quantize_stream(
        _jobs(plan, differences, threads), threads=threads, allow_nonfinite=allow_nonfinite
    )
    paths = write_gguf(out, plan.gguf.layout, slabs, progress)
    size = sum(path.stat().st_size for path in paths)
    artifact = Artifact(tuple(paths), size, time.perf_counter() - start)
    return artifact, receipt(plan.checkpoint, plan.choices, differences)


def _jobs(plan: RepackPlan, differences: dict[str, Difference], threads: int) -> Iterator[Job]:
    return packed_jobs(plan.checkpoint, plan.gguf.steps, plan.choices, differences, threads)


def packed_jobs(
    checkpoint: HfCheckpoint,
    steps: Sequence[TensorStep],
    choices: Mapping[str, Choice],
    differences: dict[str, Difference],
    threads: int,
) -> Iterator[Job]:
    """One job a step, in order; those of `choices` made from codes, the others read."""
    assert checkpoint.packed is not None
    wanted = [
        Made(step.name, step.source.name, choices[step.name].recipe, step.to)
        for step in steps
        if step.name in choices and step.source is not None
    ]
    made = repacked(checkpoint.packed, wanted, differences, threads)
    for step in steps:
        if step.name not in choices:
            for job in gguf_jobs(checkpoint, [step]):
                yield job
                release(job.raw)  # what is still to be copied comes back page by page
            continue
        rows = next(made)
        order = interleaved_rows(len(rows), step.heads) if step.heads else None
        yield Job(step.name, rows, step.to, step.to, step.shape[-1], order)


def receipt(
    checkpoint: HfCheckpoint, choices: Mapping[str, Choice], differences: Mapping[str, Difference]
) -> dict[str, Any]:
    """What became of each packed matrix, and how far a weight may be off.

    `added_error` is the relative RMS difference to the dequantized source; None where the codes
    stayed and only f16's rounding of a minimum is left, which `largest_difference` bounds.
    """
    packed = checkpoint.packed
    assert packed is not None
    tensors = []
    bounds: list[float | None] = []
    for name, choice in choices.items():
        found = differences.get(name)
        largest = choice.largest if choice.largest is not None else found.largest if found else None
        bounds.append(largest)
        tensors.append(
            {
                "name": name,
                "source": choice.source,
                "type": choice.to.name,
                "how": choice.recipe.value,
                "exact": largest == 0,
                "largest_difference": largest,
                "added_error": 0.0 if largest == 0 else found.relative if found else None,
                "why": choice.why,
            }
        )
    known = [bound for bound in bounds if bound is not None]
    return {
        "source": str(checkpoint.path),
        "format": packed.method,
        "exact": all(bound == 0 for bound in bounds),
        "largest_difference": max(known, default=0.0) if len(known) == len(bounds) else None,
        "types": dict(Counter(str(choice.to) for choice in choices.values())),
        "lossy_tensors": sum(bound != 0 for bound in bounds),
        "gathered_layers": len(packed.gathered_names()) if isinstance(packed, GptqLinears) else 0,
        "tensors": tensors,
    }


def float_type(name: str) -> GgmlType | None:
    """`--outtype` of a repack: None for auto. Raises InputError for what is no plain type."""
    if name == "auto":
        return None
    found = next((t for t in (*FLOAT_TYPES, Q8_0) if t.name == name.lower()), None)
    if found is None:
        raise InputError(
            f"--outtype {name} of a quantized directory: its codes are kept where that can be; "
            f"choose auto, or f32, f16, bf16 or q8_0 for the rest"
        )
    return found
