"""The importance matrix against llama.cpp's own activations on the same text and windows."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.imatrix import read_imatrix
from dsq.convert.pipeline import plan_gguf, run_gguf_plan
from dsq.quant.presets import preset
from dsq.runtime.calibration.calibrate import Options, calibrate, choose_windows
from dsq.runtime.llamacpp import LlamaCppEngine
from tests.models import TINY_CODER

pytestmark = pytest.mark.torch


class Tensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


class Collector:
    """What llama-imatrix's callback does: sums of squares of each matrix's input."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, int] = {}
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._see)

    def _see(self, pointer: int, ask: bool, _: Any) -> bool:
        sources = Tensor.from_address(pointer).src
        if not sources[0] or not sources[1]:
            return False
        matrix, inputs = (Tensor.from_address(source) for source in sources[:2])
        name = matrix.name.decode()
        if re.fullmatch(r"blk\.\d+\.(attn|ffn)_(?!norm)\w+\.weight", name) is None:
            return False
        if not ask:
            n_in, n_tokens = inputs.ne[:2]
            values = (ctypes.c_float * (n_in * n_tokens)).from_address(inputs.data)
            x = np.frombuffer(values, np.float32).reshape(n_tokens, n_in).astype(np.float64)
            self.sums[name] = self.sums.get(name, 0) + (x**2).sum(0)
            self.counts[name] = self.counts.get(name, 0) + n_tokens
        return True


def test_equals_llama_cpps_activations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(TINY_CODER)
    gguf = tmp_path / "f32.gguf"
    run_gguf_plan(checkpoint, plan_gguf(checkpoint, preset("f32")), gguf)
    text = (TINY_CODER / "heldout.txt").read_text(encoding="utf-8")[:8000]
    options = Options(n_ctx=128, n_threads=1)
    windows = choose_windows(checkpoint, [text], options)
    calibrate(TINY_CODER, tmp_path / "stats", windows, options=options)

    collector = Collector()
    defaults = llama_cpp.llama_context_default_params

    def with_callback() -> Any:
        params = defaults()
        params.cb_eval = collector.callback
        return params

    monkeypatch.setattr(llama_cpp, "llama_context_default_params", with_callback)
    with LlamaCppEngine(
        gguf, n_ctx=128, n_batch=128, n_threads=1, kv_type="f32", flash_attention=False
    ) as engine:
        tokens = engine.tokenizer.encode(text)
        assert len(windows) == len(tokens) // 128
        for i in range(len(windows)):  # llama-imatrix's chunks: BOS in the place of the first token
            window = [engine.tokenizer.vocab.bos, *tokens[i * 128 + 1 : (i + 1) * 128]]
            engine.logits(window)

    ours = read_imatrix(tmp_path / "stats")
    assert set(ours.values) == set(collector.sums)
    assert ours.n_chunks == len(windows)
    for name, values in ours.values.items():
        assert collector.counts[name] == windows.size
        wanted = collector.sums[name] / windows.size
        np.testing.assert_allclose(values, wanted, rtol=2e-5, err_msg=name)
