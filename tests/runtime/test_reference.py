"""The numpy graph against transformers' own Llama, in float32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dsq.convert.spec import spec_from_config
from dsq.runtime import reference
from tests.models import llama_config, random_weights

IDS = np.random.default_rng(5).integers(0, 64, 24).astype(np.int32)

ROPES: dict[str, dict[str, Any]] = {
    "plain": {"rope_theta": 10000.0, "rope_scaling": None},
    "linear": {},
    "llama3": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    },
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 256,
        }
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 24},
    "tied": {"tie_word_embeddings": True},
}


def small(**changes: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 64}
    return llama_config(**{**sizes, "max_position_embeddings": 1024, **changes})


def transformers_logits(config: dict[str, Any], weights: dict[str, np.ndarray]) -> np.ndarray:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    # bos and eos of another vocabulary would only bring a warning
    plain = {k: v for k, v in config.items() if k not in ("bos_token_id", "eos_token_id")}
    model = LlamaForCausalLM(
        LlamaConfig(**{**plain, "torch_dtype": "float32", "attn_implementation": "eager"})
    )
    state = {name: torch.from_numpy(w) for name, w in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing in ([], ["lm_head.weight"])
    model.tie_weights()
    with torch.no_grad():
        return model.eval()(torch.from_numpy(IDS[None].astype(np.int64))).logits[0].numpy()


@pytest.mark.torch
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rope", ROPES)
def test_equals_transformers(rope: str, shape: str) -> None:
    config = small(**ROPES[rope], **SHAPES[shape])
    weights = random_weights(config)
    ours = reference.forward(spec_from_config(config), weights, IDS)
    theirs = transformers_logits(config, weights)
    assert np.abs(ours - theirs).max() < 1e-4 * theirs.std()


def test_a_wrong_rope_is_far_off() -> None:
    """What the test above would see if the factor were lost."""
    config = small()
    spec, weights = spec_from_config(config), random_weights(config)
    right = reference.forward(spec, weights, IDS)
    lost = replace(spec, rope=replace(spec.rope, kind="none", factor=1.0))
    assert np.abs(reference.forward(lost, weights, IDS) - right).max() > 0.1 * right.std()


def test_only_distances_matter() -> None:
    """The whole sequence moved by 5,000 positions gives the same hidden states."""
    config = small()
    spec, weights = spec_from_config(config), random_weights(config)
    hidden = weights[reference.EMBEDDING][IDS]
    sees = reference.causal(len(IDS))
    at = np.arange(len(IDS), dtype=np.int32)
    near, far = (
        reference.layer_forward(spec, 0, weights, hidden, reference.rotation(spec, p), sees)
        for p in (at, at + 5000)
    )
    assert np.abs(near - far).max() < 1e-5


def test_a_token_sees_only_what_it_may() -> None:
    config = small()
    spec, weights = spec_from_config(config), random_weights(config)
    changed = IDS.copy()
    changed[10] = (changed[10] + 1) % 64
    before, after = (reference.forward(spec, weights, ids) for ids in (IDS, changed))
    assert np.array_equal(before[:10], after[:10])
    assert (before[10:] != after[10:]).any(axis=1).all()
