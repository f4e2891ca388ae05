"""What feedback leaves of a type's error, told from some rows, against files that have it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.gguf.reader import read_gguf
from dsq.convert.pipeline import plan_gguf, run_gguf_plan
from dsq.quant import ggml
from dsq.quant.mix import candidates
from dsq.quant.plan import Options
from dsq.quant.presets import preset
from dsq.quant.scheme import BF16
from dsq.quant.stats import input_of, read_stats
from dsq.runtime.calibration import calibrate
from dsq.runtime.fidelity import after_feedback, compensate
from dsq.runtime.fidelity.sensitivity import sensitivities
from tests.models import llama_config, write_hf

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

IDS = np.random.default_rng(0).integers(0, 4000, (8, 64)).astype(np.int32)


def test_it_is_the_error_of_a_compensated_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its first matrices, which read what the original's read, and have nothing to make up
    for."""
    model = write_hf(tmp_path / "hf", llama_config(num_key_value_heads=2, num_hidden_layers=1))
    checkpoint, kind = open_checkpoint(model), preset("q4_0")
    how = calibrate.Options(hessians=True, gradients=True, n_threads=1, device="cpu")
    calibrate.calibrate(model, tmp_path / "stats", IDS, options=how)
    stats = read_stats(tmp_path / "stats")
    plain = sensitivities(checkpoint, stats, n_threads=1, types=lambda n: candidates(n)[6:8])
    options = Options(token_embedding_type=BF16, pure=True)
    plan = plan_gguf(checkpoint, kind, options=options)
    out, original = tmp_path / "out.gguf", tmp_path / "original.gguf"
    alone = compensate.Options(n_threads=1, device="cpu")
    compensate.quantize(checkpoint, plan, IDS, out, alone)
    run_gguf_plan(checkpoint, plan_gguf(checkpoint, preset("bf16")), original)

    def rows(path: Path, name: str) -> np.ndarray:
        file = read_gguf(path)
        info = file.tensors[name]
        return ggml.dequantize(file.data(name), info.type, info.shape[-1])

    few = after_feedback.after_feedback(checkpoint, stats, plain, n_threads=1)
    monkeypatch.setattr(after_feedback, "ROWS", 1 << 20)
    every = after_feedback.after_feedback(checkpoint, stats, plain, n_threads=1)
    for linear in ("attn_q", "attn_k", "attn_v"):
        name = f"blk.0.{linear}.weight"
        missed = rows(out, name) - rows(original, name)
        hessian = stats.inputs[input_of(name)].hessian
        costs = np.einsum("oi,oi->o", missed @ hessian, missed)
        left = 0.5 * float(stats.gradients[name] @ costs)
        (found,) = (choice for choice in every[name] if choice.type.name == "q4_0")
        assert found.kld == pytest.approx(left, rel=1e-3)
        (before,) = (choice for choice in plain[name] if choice.type.name == "q4_0")
        assert found.kld < 0.9 * before.kld
        assert found.n_bytes == before.n_bytes
    for name, choices in every.items():
        for choice, estimate in zip(choices, few[name], strict=True):
            assert estimate.kld == pytest.approx(choice.kld, rel=0.3)
    assert few["output.weight"] == plain["output.weight"]  # it is left to ggml
