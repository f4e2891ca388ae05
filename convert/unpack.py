"""GPTQ and EXL2 directories → dense Hugging Face directories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsq.convert.checkpoint import HfCheckpoint
from dsq.convert.hf.writer import plan_to_hf, write_hf
from dsq.convert.pipeline import Artifact, Progress
from dsq.convert.repack import Choice, packed_jobs, receipt
from dsq.convert.repack_jobs import Difference, Recipe
from dsq.convert.tensor_plan import TensorStep
from dsq.errors import InputError
from dsq.quant.scheme import F32
from dsq.quant.threads import default_threads


def plan_unpack(
    checkpoint: HfCheckpoint, outtype: str = "auto", *, exact: bool = False
) -> tuple[TensorStep, ...]:
    """Every tensor, dense. `auto` is f32, which alone holds code · scale exactly; `exact` refuses
    another type."""
    if checkpoint.packed is None:
        raise InputError(f"{checkpoint.path}: is neither GPTQ nor EXL2; nothing to unpack")
    steps = plan_to_hf(checkpoint, "f32" if outtype == "auto" else outtype)
    if exact and steps[0].to is not F32:
        raise InputError(
            f"--outtype {outtype}: rounds the weights; leave out --exact, or take --outtype f32"
        )
    return steps


def run_unpack(
    checkpoint: HfCheckpoint,
    steps: Sequence[TensorStep],
    out: Path,
    *,
    force: bool = False,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    pre: str | None = None,
    progress: Progress = lambda n: None,
) -> tuple[Artifact, dict[str, Any]]:
    """Write the directory, which appears when it is complete. Returns it and the receipt: see
    `repack.receipt`. `allow_nonfinite`: as in `run_repack`."""
    packed = checkpoint.packed
    assert packed is not None
    threads = threads or default_threads()
    choices = {
        step.name: Choice(
            packed.kind(step.name), Recipe.ROUNDED, step.to, 0.0 if step.to is F32 else None
        )
        for step in steps
        if step.name in packed.tensors
    }
    differences: dict[str, Difference] = {}
    artifact = write_hf(
        checkpoint,
        steps,
        out,
        force=force,
        threads=threads,
        allow_nonfinite=allow_nonfinite,
        pre=pre,
        progress=progress,
        jobs=packed_jobs(checkpoint, steps, choices, differences, threads),
    )
    return artifact, receipt(checkpoint, choices, differences)
