"""tiny-coder is good enough to show damage: a lost RoPE factor, a lost pre-tokenizer.

Perplexity is told per byte (bits), because another tokenization cuts the text into other tokens.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.pipeline import plan_gguf, run_gguf_plan
from dsq.quant.drift import Accumulator
from dsq.quant.presets import PRESETS
from dsq.runtime import windows
from dsq.runtime.llama_vocab import LlamaVocab
from dsq.runtime.llamacpp import LlamaCppEngine
from tests.models import TINY_CODER

N_CTX = 512
TEXT = (TINY_CODER / "heldout.txt").read_text()[:40_000]


def damaged(out, **changes):
    """tiny-coder as bf16 GGUF with metadata changed; None takes the key away."""
    checkpoint = open_checkpoint(TINY_CODER)
    plan = plan_gguf(checkpoint, PRESETS["bf16"])
    entries = [
        replace(e, value=changes[e.key]) if e.key in changes else e
        for e in plan.layout.entries
        if changes.get(e.key, "") is not None
    ]
    plan = replace(plan, layout=replace(plan.layout, entries=tuple(entries)))
    run_gguf_plan(checkpoint, plan, out)
    return out


def bits_per_byte(path):
    """As llama.cpp alone would run it: its own tokenization, its own RoPE."""
    bos = json.loads((TINY_CODER / "config.json").read_text())["bos_token_id"]
    ids = [bos, *LlamaVocab(path).encode(TEXT)]
    cut = windows.cut(ids, N_CTX, bos=bos, chunks=None)
    total = Accumulator()
    with LlamaCppEngine(path, n_ctx=N_CTX) as engine:
        for window, targets in zip(cut.ids, cut.targets, strict=True):
            total.add(engine.window_logits(window[None], cut.first), targets, None)
    return float(np.log2(total.ppl)) * len(ids) / len(TEXT.encode())


@pytest.fixture(scope="module")
def as_trained(tmp_path_factory):
    return bits_per_byte(damaged(tmp_path_factory.mktemp("tiny") / "right.gguf"))


def test_it_has_learned_python(as_trained):
    assert as_trained < 1.7  # 8 would be noise; a card in models/tiny-coder says what is usual


def test_a_lost_rope_factor_shows(as_trained, tmp_path):
    wrong = damaged(tmp_path / "factor.gguf", **{"llama.rope.scaling.factor": 1.0})
    assert bits_per_byte(wrong) > 1.1 * as_trained


def test_a_lost_pre_tokenizer_shows(as_trained, tmp_path):
    """GGUF files from before April 2024 lack the key; llama.cpp still loads them, and errs."""
    wrong = damaged(tmp_path / "pre.gguf", **{"tokenizer.ggml.pre": None})
    assert bits_per_byte(wrong) > 1.1 * as_trained


def test_it_is_deepseek_coder_in_miniature():
    config = json.loads((TINY_CODER / "config.json").read_text())
    assert config["rope_theta"] == 100000
    assert config["rope_scaling"] == {"type": "linear", "factor": 4.0}
    assert config["hidden_size"] % 256 == config["intermediate_size"] % 256 == 0
    vocabulary = open_checkpoint(TINY_CODER).vocabulary()
    assert vocabulary.pre == "deepseek-coder"
    assert vocabulary.tokens[-1].startswith("[PAD")  # more rows than tokens
    size = (TINY_CODER / "model.safetensors").stat().st_size
    assert size <= 12_000_000
