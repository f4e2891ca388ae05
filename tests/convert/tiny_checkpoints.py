"""Checkpoints of a few kilobytes, and how one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.names import expected_tensors
from dsq.convert.spec import spec_from_config
from dsq.errors import DsqError, InputError

Weights = dict[str, np.ndarray]

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 11,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_theta": 100000,
    "rope_scaling": {"type": "linear", "factor": 4.0},
}


def weights_of(config: dict[str, Any] = CONFIG) -> Weights:
    rng = np.random.default_rng(0)
    shapes = expected_tensors(spec_from_config(config))
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def write_config(folder: Path, config: dict[str, Any] = CONFIG) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def hf(folder: Path, **changes: Any) -> Path:
    config = {**CONFIG, **changes}
    write_config(folder, config)
    save_file(weights_of(config), folder / "model.safetensors")
    return folder


def refused(source: Path, message: str, kind: type[DsqError] = InputError) -> None:
    with pytest.raises(kind) as caught:
        open_checkpoint(source)
    assert message in str(caught.value)
    assert str(source) in str(caught.value)
    assert "\n" not in str(caught.value)
