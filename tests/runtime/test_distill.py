"""Distillation: the same format and size, closer to the original on text never trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.pipeline import plan_gguf, run_gguf_plan
from dsq.errors import InputError
from dsq.quant.presets import preset
from dsq.runtime.evaluate import evaluate
from dsq.runtime.fidelity.distill import Options, Report, distill
from dsq.runtime.windows import cut
from dsq.tokenizer_port.tokenizer import Tokenizer
from tests.models import TINY_CODER, llama_config, write_hf

pytestmark = pytest.mark.torch

HELDOUT = (TINY_CODER / "heldout.txt").read_text(encoding="utf-8")
HALF = len(HELDOUT) // 2
N_CTX = 128
FAST = Options(batch_tokens=512, epochs=1, check_every=4, lr=4e-3)


def quantized(folder: Path, name: str, source: Path = TINY_CODER) -> Path:
    checkpoint = open_checkpoint(source)
    out = folder / f"{name}.gguf"
    run_gguf_plan(checkpoint, plan_gguf(checkpoint, preset(name)), out)
    return out


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    """From the first half of the held-out text; the second half judges."""
    tokenizer = Tokenizer.from_vocabulary(open_checkpoint(TINY_CODER).vocabulary())
    return cut(tokenizer.encode(HELDOUT[:HALF]), N_CTX, bos=tokenizer.vocab.bos, chunks=44).ids


@pytest.fixture(scope="module")
def distilled(
    windows: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Report]:
    folder = tmp_path_factory.mktemp("distill")
    file, out = quantized(folder, "q4_0"), folder / "out.gguf"
    return file, out, distill(TINY_CODER, file, out, windows, FAST)


def kld(model: Path, ref: Path) -> float:
    measured = evaluate(
        model, texts=[HELDOUT[HALF:]], ref=ref, n_ctx=N_CTX, chunks=10, use_cache=False
    )
    assert measured.drift.kld_mean is not None
    return measured.drift.kld_mean


def test_closer_on_other_text(distilled: tuple[Path, Path, Report], tmp_path: Path) -> None:
    before, after, report = distilled
    ref = quantized(tmp_path, "f32")
    assert kld(after, ref) < 0.85 * kld(before, ref)  # measured: 0.73
    assert report.kld_after < 0.85 * report.kld_before


def test_only_scales_and_gains_change(distilled: tuple[Path, Path, Report]) -> None:
    before, after, _ = (open_checkpoint(p) if isinstance(p, Path) else p for p in distilled)
    assert before.path.stat().st_size == after.path.stat().st_size
    assert before.gguf.metadata.keys() == after.gguf.metadata.keys()
    for name, info in before.tensors.items():
        mine = np.frombuffer(after.data(name), np.uint8)
        theirs = np.frombuffer(before.data(name), np.uint8)
        if info.type.name == "q4_0":  # an f16 scale, then the codes of 32 weights
            np.testing.assert_array_equal(
                mine.reshape(-1, 18)[:, 2:], theirs.reshape(-1, 18)[:, 2:]
            )
        elif not name.endswith("norm.weight"):
            np.testing.assert_array_equal(mine, theirs)


def test_the_report_is_of_the_file_that_was_written(
    distilled: tuple[Path, Path, Report], windows: np.ndarray, tmp_path: Path
) -> None:
    """Distilling the result again starts where the first run ended."""
    _, after, report = distilled
    again = distill(TINY_CODER, after, tmp_path / "again.gguf", windows, replace(FAST, epochs=0))
    assert again.kld_before == pytest.approx(report.kld_after, rel=1e-4)
    assert again.steps == 0
    assert (tmp_path / "again.gguf").read_bytes() == after.read_bytes()


def test_computing_layers_again_changes_nothing(tmp_path: Path, windows: np.ndarray) -> None:
    few = windows[:8]
    file = quantized(tmp_path, "q4_k_m")
    for name, n_bytes in (("kept", 1 << 40), ("again", 0)):
        report = distill(
            TINY_CODER, file, tmp_path / f"{name}.gguf", few, replace(FAST, keep_bytes=n_bytes)
        )
        assert report.layers_kept is (name == "kept")
    assert (tmp_path / "kept.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()


def test_bad_input(tmp_path: Path, windows: np.ndarray) -> None:
    file = quantized(tmp_path, "q4_0")
    with pytest.raises(InputError, match="too few"):
        distill(TINY_CODER, file, tmp_path / "out.gguf", windows[:3])
    other = write_hf(tmp_path / "other", llama_config())
    with pytest.raises(InputError, match="n_layer is 4, but 2"):
        distill(other, file, tmp_path / "out.gguf", windows)
    with pytest.raises(InputError, match="no tensor of a type"):
        distill(TINY_CODER, quantized(tmp_path, "f16"), tmp_path / "out.gguf", windows)
    assert not (tmp_path / "out.gguf").exists()


class Killed(BaseException):
    """Stands for SIGKILL: nobody catches it."""


@pytest.mark.parametrize("moment", ["original", "distilling"])
def test_a_killed_run_goes_on_to_the_same_bytes(
    moment: str, windows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, few = quantized(tmp_path, "q4_0"), windows[:24]
    options = replace(FAST, check_every=2)
    whole = distill(TINY_CODER, file, tmp_path / "whole.gguf", few, options)

    def kill(what: str, done: int, total: int, ratio: float) -> None:
        # The second look: what the first one kept is gone on with.
        if what == moment and done >= min(4, total):
            raise Killed

    out = tmp_path / "killed.gguf"
    with pytest.raises(Killed):
        distill(TINY_CODER, file, out, few, options, progress=kill)
    assert not out.exists()
    done: list[tuple[str, int]] = []
    again = distill(
        TINY_CODER, file, out, few, options, progress=lambda what, n, *_: done.append((what, n))
    )
    if moment == "distilling":
        assert done[0] == ("distilling", 4)  # the original is not run again, nor are steps 1 and 2
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert (again.steps, again.kld_after) == (whole.steps, whole.kld_after)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed.gguf", "q4_0.gguf", "whole.gguf"]


def test_steps_that_are_too_large_are_taken_back_and_shrink(
    windows: np.ndarray, tmp_path: Path
) -> None:
    file = quantized(tmp_path, "q4_0")
    wild = replace(FAST, lr=0.2, check_every=1)
    report = distill(TINY_CODER, file, tmp_path / "out.gguf", windows, wild)
    assert report.kld_after < 0.95 * report.kld_before
