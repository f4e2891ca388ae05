"""`best-N` killed in one step after the other: no step again, the same bytes in the end."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from dsq.errors import InputError
from dsq.runtime.calibration.workdir import WorkDir
from dsq.runtime.fidelity.best import Options, Report, best, calibrate
from dsq.runtime.fidelity.mix import Budget
from tests.models import llama_config, write_hf
from tests.runtime.changed import changed
from tests.runtime.dying import die

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

BORDER = "dsq.runtime.calibration.borders:Border.write"
IDS = np.random.default_rng(0).integers(0, 4000, (16, 32)).astype(np.int32)


def run(model: Path, out: Path, seed: int = 0) -> tuple[Report, list[str]]:
    """The report, and what was told on the way."""
    told: list[str] = []
    options = Options(n_threads=1, seed=seed, device="cpu", text="noise")
    report = best(model, out, IDS, Budget("bpw", 5.0), options, tell=told.append)
    return report, told


_CHILD = """
from pathlib import Path
from tests.runtime.test_resume_best import run
run(Path(model), Path(out))
"""


@pytest.mark.slow
def test_killed_in_one_step_after_the_other(tmp_path: Path) -> None:
    model = write_hf(tmp_path / "hf", llama_config())
    out, whole = tmp_path / "m.gguf", tmp_path / "whole.gguf"
    report, told = run(model, whole)
    assert [step.name for step in report.steps] == [
        *("stock iq4_xs", "mix", "compensated", "distilled")
    ]
    for where in (
        "dsq.runtime.calibration.steps:Steps._output",  # the layers are done
        "dsq.runtime.fidelity.teacher:Teacher.run",
        "dsq.runtime.fidelity.best:measure_table",
        "dsq.convert.gguf.writer:start_writeback",  # the stock file
        "dsq.runtime.fidelity.two_ways:TwoWays.leave",  # compensated
        "dsq.runtime.fidelity.best:distill.distill",
        "dsq.runtime.fidelity.best:Report",  # all is done
    ):
        die(_CHILD, where, 1, model=model, out=out)
    with pytest.raises(InputError, match="holds an unfinished run with other settings"):
        run(model, out, seed=1)
    again, told_again = run(model, out)
    assert again == report
    assert out.read_bytes() == whole.read_bytes()
    # All that was left to do is to say how the steps came out.
    assert told_again == [line for line in told if "KLD" in line]
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "m.gguf", "whole.gguf"}


def interrupted(*args: object, **named: object) -> None:
    raise KeyboardInterrupt


def test_a_source_that_changed_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even in a matrix's last row, and with the same sizes."""
    original, out = write_hf(tmp_path / "original", llama_config()), tmp_path / "m.gguf"
    model = tmp_path / "hf"
    shutil.copytree(original, model)
    monkeypatch.setattr(calibrate, "calibrate", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(model, out)
    changed(original, model, "model.layers.1.mlp.up_proj.weight", 0.5)
    with pytest.raises(InputError, match="holds an unfinished run with other settings"):
        run(model, out)


def test_two_runs_on_one_output(tmp_path: Path) -> None:
    model, out = write_hf(tmp_path / "hf", llama_config()), tmp_path / "m.gguf"
    with WorkDir(out, "settings"), pytest.raises(InputError, match="being written by another run"):
        run(model, out)
