"""The torch decoder, layer by layer, against transformers and against dsq's numpy reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.pipeline import plan_gguf, run_gguf_plan
from dsq.quant.presets import preset
from dsq.runtime import decoder
from dsq.runtime.torch_engine import TorchEngine
from tests.models import llama_config, write_hf

pytestmark = pytest.mark.torch

N_CTX = 48


def run(path: Path, ids: np.ndarray) -> np.ndarray:
    """Logits (windows, n_ctx, n_vocab) of a model, one layer in memory at a time."""
    import torch

    checkpoint = open_checkpoint(path)
    graph = decoder.Decoder(checkpoint.spec, ids.shape[1])
    embedding = decoder.read_tensor(checkpoint, "model.embed_tokens.weight")
    hidden = embedding[torch.from_numpy(ids)]
    for i in range(checkpoint.spec.n_layer):
        hidden = graph.layer(decoder.read_layer(checkpoint, i), hidden)
    head = embedding if checkpoint.spec.tied else decoder.read_tensor(checkpoint, "lm_head.weight")
    norm = decoder.read_tensor(checkpoint, "model.norm.weight")
    return graph.logits(norm, head, hidden).numpy()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 2, "tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ],
    ids=["mha", "mqa", "gqa-tied", "biases", "llama3-rope"],
)
def test_equals_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = write_hf(tmp_path / "model", llama_config(**changes), dtype="F32")
    ids = np.random.default_rng(0).integers(0, 4000, (2, N_CTX))
    with TorchEngine(path, n_ctx=N_CTX) as engine:
        theirs = np.stack([engine.logits(row.tolist()) for row in ids])
    np.testing.assert_allclose(run(path, ids), theirs, atol=2e-4, rtol=1e-4)


def test_a_gguf_gives_the_same_as_its_checkpoint(tmp_path: Path) -> None:
    """Q and K rows are back in Hugging Face's order, their biases too."""
    config = llama_config(attention_bias=True, num_key_value_heads=2)
    source = open_checkpoint(write_hf(tmp_path / "model", config, dtype="BF16"))
    out = tmp_path / "model.gguf"
    run_gguf_plan(source, plan_gguf(source, preset("bf16")), out)
    ids = np.random.default_rng(1).integers(0, 4000, (1, N_CTX))
    np.testing.assert_array_equal(run(out, ids), run(source.path, ids))
