"""The f32 GGUF in llama.cpp computes what the checkpoint computes in transformers.

Positions 0 to 8,191, so that a wrong RoPE factor cannot hide; for every spelling of the factor
and every kind of attention.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.pipeline import plan_gguf, run_gguf_plan
from dsq.quant.presets import PRESETS
from dsq.runtime.llamacpp import LlamaCppEngine
from tests.models import llama_config, write_hf

pytestmark = pytest.mark.torch

N_POSITIONS = 8192
TOLERANCE = 5e-3

LINEAR = {"factor": 4.0}
SPELLINGS = {
    "type": {"rope_theta": 100000, "rope_scaling": {"type": "linear", **LINEAR}},
    "rope_type": {"rope_theta": 100000, "rope_scaling": {"rope_type": "linear", **LINEAR}},
    "both": {
        "rope_theta": 100000,
        "rope_scaling": {"type": "linear", "rope_type": "linear", **LINEAR},
    },
    "rope_parameters": {
        "rope_theta": None,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 100000.0, **LINEAR},
    },
}
ATTENTION = {"GQA": 2, "MQA": 1}  # of 4 heads; the spellings are tested with 4
OTHER_KINDS = {
    "none": {"rope_theta": 100000, "rope_scaling": None},
    "llama3": {
        "rope_theta": 100000,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "yarn": {
        "rope_theta": 100000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 4096,
        },
    },
    "yarn with its own attention factor": {
        "rope_theta": 100000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 4096,
            "attention_factor": 1.3,
        },
    },
}


def config(**changes):
    shape = {"hidden_size": 64, "intermediate_size": 96, "torch_dtype": "float32"}
    return llama_config(**{**shape, **changes})


def in_transformers(folder, ids):
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.from_numpy(ids)[None]).logits[0].numpy()


def in_llama_cpp(folder, ids, out):
    checkpoint = open_checkpoint(folder)
    run_gguf_plan(checkpoint, plan_gguf(checkpoint, PRESETS["f32"]), out)
    with LlamaCppEngine(out, n_ctx=len(ids), kv_type="f32", flash_attention=False) as engine:
        return engine.logits(ids.tolist())


def largest_difference(tmp_path, cfg, n_positions=N_POSITIONS):
    folder = write_hf(tmp_path / "hf", cfg, dtype="F32")
    ids = np.random.default_rng(3).integers(0, 4000, n_positions)
    theirs = in_transformers(folder, ids)
    ours = in_llama_cpp(folder, ids, tmp_path / "f32.gguf")
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max())


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_the_factor_to_position_8191(tmp_path, spelling):
    assert largest_difference(tmp_path, config(**SPELLINGS[spelling])) < TOLERANCE


@pytest.mark.parametrize("attention", ["GQA", "MQA"])
def test_shared_kv_heads_to_position_8191(tmp_path, attention):
    assert (
        largest_difference(tmp_path, config(num_key_value_heads=ATTENTION[attention])) < TOLERANCE
    )


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_rope_kinds(tmp_path, kind):
    assert largest_difference(tmp_path, config(**OTHER_KINDS[kind])) < TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
        {"head_dim": 32},
    ],
    ids=["tied", "biases", "explicit head_dim"],
)
def test_other_shapes(tmp_path, changes):
    assert largest_difference(tmp_path, config(**changes), 600) < TOLERANCE


def test_the_tolerance_would_see_a_lost_factor(tmp_path):
    folder = write_hf(tmp_path / "hf", config(), dtype="F32")
    ids = np.random.default_rng(3).integers(0, 4000, 64)
    theirs = in_transformers(folder, ids)
    damaged = json.loads((folder / "config.json").read_text())
    damaged["rope_scaling"] = None
    (folder / "config.json").write_text(json.dumps(damaged))
    ours = in_llama_cpp(folder, ids, tmp_path / "f32.gguf")
    assert np.abs(ours - theirs).max() > 10 * TOLERANCE
