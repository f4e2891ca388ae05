"""One pass over calibration text that yields what every method needs: see `dsq.quant.stats`.

Layer by layer: all windows pass one layer, whose weights alone are in memory, before the next is
read. Hidden states lie on disk between two layers (`borders`). Each layer is a step that is
finished as a whole: after a kill the run goes on with the step it was at, and the bytes are the
same. With gradients the first windows' borders are kept, and the layers are gone through backwards
(`fisher`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsq.convert.atomic import check_space, check_target
from dsq.convert.checkpoint import open_checkpoint
from dsq.runtime.calibration.peak_memory import PeakMemory
from dsq.runtime.calibration.plan import Options, choose_windows, plan_run
from dsq.runtime.calibration.steps import FILE, Progress, Steps
from dsq.runtime.calibration.workdir import WorkDir
from dsq.runtime.fidelity.source_check import check_not_source

__all__ = ["Options", "Report", "calibrate", "choose_windows"]


@dataclass(frozen=True)
class Report:
    """What was done. `peak_bytes`: heap and stacks of this process, without mapped files."""

    out: str
    n_tokens: int
    n_windows: int
    n_ctx: int
    hessians: bool
    n_gradient_tokens: int
    size_bytes: int
    resumed_steps: int  # done by an earlier run
    seconds: float  # of this run, tokenizing left out
    tokens_per_second: float
    peak_bytes: int | None
    peak_device_bytes: int | None  # CUDA's
    device: str
    n_threads: int
    record: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def calibrate(
    source: str | Path,
    out: Path,
    ids: npt.NDArray[np.int32],
    *,
    about_text: Mapping[str, Any] | None = None,
    options: Options | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Run `source` (GGUF or Hugging Face directory) over `ids` and write statistics to `out`.

    `ids` (windows, n_ctx): each window stands alone, see `choose_windows`. `about_text` goes into
    the record as it is. A run that was killed goes on where it was. Raises InputError for an output
    that exists (unless `force`) or is being written, and a disk too small; DsqError for activations
    that are NaN or Inf.
    """
    check_target(out, force=force or WorkDir.owns(out))
    checkpoint = open_checkpoint(source)
    check_not_source(checkpoint, out)
    plan = plan_run(checkpoint, ids, options or Options(), about_text or {})
    with PeakMemory() as peak:
        start = time.perf_counter()
        with WorkDir(out, plan.fingerprint) as work:
            resumed = work.done
            if not resumed:
                check_space(out, plan.disk_bytes)
            Steps(plan, work).go(progress)
            size = (work.path / FILE).stat().st_size
            work.finish(FILE, out, force=force)
        seconds = time.perf_counter() - start
    return Report(
        out=str(out),
        n_tokens=ids.size,
        n_windows=len(ids),
        n_ctx=plan.n_ctx,
        hessians=plan.options.hessians,
        n_gradient_tokens=plan.n_gradient * plan.n_ctx,
        size_bytes=size,
        resumed_steps=resumed,
        seconds=seconds,
        tokens_per_second=ids.size / seconds,
        peak_bytes=peak.n_bytes,
        peak_device_bytes=_device_peak(plan.device),
        device=plan.device,
        n_threads=plan.n_threads,
        record=plan.record,
    )


def _device_peak(device: str) -> int | None:
    import torch

    return int(torch.cuda.max_memory_allocated()) if device == "cuda" else None
