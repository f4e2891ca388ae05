"""Every spelling of RoPE reads alike, or is refused by name: the factor is never lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dsq.convert.rope import Rope, rope_from_config, rope_from_gguf
from dsq.errors import InputError, UnsupportedError

LINEAR_4 = Rope(freq_base=100000.0, kind="linear", factor=4.0)
LLAMA3 = Rope(500000.0, "llama3", 8.0, 8192, 1.0, 4.0)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 100000, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 100000, "rope_scaling": {"rope_type": "linear", "factor": 4}},
        {
            "rope_theta": 100000.0,
            "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0},
        },
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0}},
        {
            "rope_theta": 100000,
            "rope_scaling": {"type": "linear", "factor": 4.0},
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0},
        },
    ],
    ids=["type", "rope_type", "both", "rope_parameters", "old and new"],
)
def test_all_spellings_of_linear_4_read_alike(config: dict[str, Any]) -> None:
    assert rope_from_config(config) == LINEAR_4


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rope_scaling": None},
        {"rope_scaling": {}},
        {"rope_scaling": {"type": "default"}},
        {"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10000}},
    ],
)
def test_no_scaling(config: dict[str, Any]) -> None:
    assert rope_from_config(config) == Rope(freq_base=10000.0)


@pytest.mark.parametrize(
    "rope",
    [
        Rope(),
        Rope(freq_base=12345.5),
        LINEAR_4,
        LLAMA3,
        Rope(1e4, "yarn", 8.0, 4096),
        Rope(1e4, "yarn", 8.0, 4096, attention_factor=1.5, beta_fast=16.0, beta_slow=2.0),
    ],
)
def test_to_config_is_read_back(rope: Rope) -> None:
    assert rope_from_config(rope.to_config()) == rope


def test_base_in_rope_parameters_alone() -> None:
    parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0}
    config = {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": parameters}
    assert rope_from_config(config) == LINEAR_4


def test_base_in_rope_scaling_alone() -> None:
    scaling = {"type": "linear", "factor": 4.0, "rope_theta": 100000.0}
    assert rope_from_config({"rope_scaling": scaling}) == LINEAR_4


def test_yarn_takes_the_context_for_the_original_one() -> None:
    config = {"max_position_embeddings": 4096, "rope_scaling": {"type": "yarn", "factor": 8.0}}
    assert rope_from_config(config) == Rope(1e4, "yarn", 8.0, 4096)
    config["original_max_position_embeddings"] = 2048
    assert rope_from_config(config) == Rope(1e4, "yarn", 8.0, 2048)


def test_linear_divides_positions() -> None:
    plain, scaled = Rope(1e5).inv_freq(8)[0], LINEAR_4.inv_freq(8)[0]
    np.testing.assert_allclose(plain, [1e5 ** (-2 * i / 8) for i in range(4)])
    np.testing.assert_array_equal(plain / 4, scaled)


def test_linear_config_suits_exllamav2() -> None:
    assert LINEAR_4.to_config() == {
        "rope_theta": 100000,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    }


LINEAR = {"type": "linear", "factor": 4.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {**LINEAR, "rope_type": "yarn"}}, "type and rope_type that differ"),
        (
            {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "rope_scaling says linear, factor 4, base 10000 but rope_parameters says linear, fac",
        ),
        (
            {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}},
            "remove the wrong one",
        ),
        (
            {"rope_theta": 1e5, "rope_parameters": {**LINEAR, "rope_theta": 1e4}},
            "rope_theta is 100000.0 but rope_parameters.rope_theta is 10000.0",
        ),
        ({"rope_scaling": {"factor": 4.0}}, "has a factor but no type"),
        ({"rope_scaling": {"type": "linear"}}, "of type 'linear' lacks its factor"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor is '4'; expected a number"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor is True; expected a number"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "it must be a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "too large a number"),
        ({"rope_theta": float("inf")}, "rope_theta is too large a number"),
        ({"rope_theta": "1e5"}, "rope_theta is '1e5'; expected a number"),
        ({"rope_theta": -1}, "rope_theta is -1.0; it must be a positive number"),
        ({"rope_scaling": [4.0]}, r"rope_scaling is \[4.0\]; expected an object"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "original_max_position_embeddings"),
        (
            {"rope_scaling": {**YARN, "type": "llama3", "high_freq_factor": 1.0}},
            "the high one must be larger",
        ),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": []}}, "expected a number"),
        ({"rope_scaling": {**YARN, "attention_factor": "1"}}, "expected a number"),
        ({"rope_scaling": {**YARN, "beta_fast": -1}}, "positive beta_fast"),
    ],
)
def test_contradictions_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        rope_from_config(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type 'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "type 'longrope' is not supported"),
        ({"rope_scaling": {"type": ["linear"]}}, "is not supported"),
        ({"rope_scaling": {**LINEAR, "partial_rotary_factor": 0.5}}, "rope_scaling.partial_rotary"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        ({"rope_parameters": {"full_attention": LINEAR}}, "full_attention is an object"),
        ({"rope_scaling": {**YARN, "mscale": 0.7}}, "mscale is not supported"),
        ({"rope_scaling": {**YARN, "truncate": False}}, "truncate false is not supported"),
    ],
)
def test_what_is_not_understood_is_unsupported(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        rope_from_config(config)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        ({"type": "linear", "factor": 4.0}, 16384),
        (
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            131072,
        ),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        (
            {
                "rope_type": "yarn",
                "factor": 16.0,
                "original_max_position_embeddings": 8192,
                "attention_factor": 1.5,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
            },
            131072,
        ),
        ({"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 4096}, 4096),
    ],
    ids=["linear", "llama3", "yarn", "yarn with all settings", "yarn of factor 1"],
)
@pytest.mark.parametrize(("head_dim", "theta"), [(128, 100000.0), (64, 500000.0)])
def test_inv_freq_equals_transformers(
    scaling: dict[str, Any], context: int, head_dim: int, theta: float
) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        max_position_embeddings=context,
        rope_theta=theta,
        rope_scaling=dict(scaling),
    )
    name = scaling.get("type", scaling.get("rope_type"))
    theirs, their_scale = ROPE_INIT_FUNCTIONS[name](config, "cpu")
    ours, our_scale = rope_from_config(
        {"rope_theta": theta, "rope_scaling": scaling, "max_position_embeddings": context}
    ).inv_freq(head_dim)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-5)  # theirs is float32
    assert our_scale == pytest.approx(their_scale, rel=1e-6)


# GGUF


BASE = {"llama.rope.freq_base": 100000.0}
SCALING = "llama.rope.scaling"


@pytest.mark.parametrize(
    "metadata",
    [
        {f"{SCALING}.type": "linear", f"{SCALING}.factor": 4.0},
        {f"{SCALING}.factor": 4.0},
        {"llama.rope.scale_linear": 4.0},
        {f"{SCALING}.type": "linear", "llama.rope.scale_linear": 4.0},
        {f"{SCALING}.factor": 4.0, "llama.rope.scale_linear": 2.0},
    ],
    ids=["type and factor", "factor alone", "old key", "type and old key", "new key wins"],
)
def test_gguf_linear_as_llama_cpp_reads_it(metadata: dict[str, Any]) -> None:
    assert rope_from_gguf({**BASE, **metadata}, "llama") == LINEAR_4


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {f"{SCALING}.type": "none"},
        {f"{SCALING}.type": "none", f"{SCALING}.factor": 4.0},
        {f"{SCALING}.type": "linear", f"{SCALING}.factor": 1.0},
        {f"{SCALING}.type": "linear", f"{SCALING}.factor": 0.0},
        {"llama.rope.scale_linear": 1.0},
    ],
)
def test_gguf_without_scaling(metadata: dict[str, Any]) -> None:
    assert rope_from_gguf({**BASE, **metadata}, "llama") == Rope(freq_base=100000.0)


def test_gguf_yarn() -> None:
    metadata = {
        "llama.context_length": 16384,
        f"{SCALING}.type": "yarn",
        f"{SCALING}.factor": 4.0,
        f"{SCALING}.original_context_length": 4096,
        f"{SCALING}.yarn_beta_fast": 16.0,
    }
    rope = rope_from_gguf(metadata, "llama")
    assert rope == Rope(10000.0, "yarn", 4.0, 4096)  # llama.cpp does not read the beta there
    # the runtime reads no yarn_attn_factor for llama, so neither do we
    assert rope_from_gguf({**metadata, f"{SCALING}.yarn_attn_factor": 1.5}, "llama") == rope
    # attn_factor multiplies what YaRN infers: 0.1 ln 4 + 1
    on_top = rope_from_gguf({**metadata, f"{SCALING}.attn_factor": 2.0}, "llama")
    assert on_top.inv_freq(64)[1] == pytest.approx(2 * rope.inv_freq(64)[1])


def test_gguf_llama3_is_found_from_its_factors() -> None:
    factors = LLAMA3.freq_factors(128).astype(np.float32)
    metadata = {"llama.rope.freq_base": 500000.0}
    assert rope_from_gguf(metadata, "llama", freq_factors=factors, head_dim=128) == LLAMA3
    ones = np.ones(64, np.float32)
    assert rope_from_gguf(metadata, "llama", freq_factors=ones, head_dim=128).kind == "none"
    with pytest.raises(UnsupportedError, match="fits no known llama3 scaling"):
        rope_from_gguf(metadata, "llama", freq_factors=factors[::-1], head_dim=128)
    # a factor beside rope_freqs must not be dropped
    with pytest.raises(UnsupportedError, match=r"rope_freqs\.weight beside"):
        rope_from_gguf(
            {**metadata, f"{SCALING}.factor": 4.0}, "llama", freq_factors=factors, head_dim=128
        )


@pytest.mark.parametrize("kind", ["longrope", "llama3", 7])
def test_gguf_unsupported_kinds(kind: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"llama\.rope\.scaling\.type is "):
        rope_from_gguf({f"{SCALING}.type": kind}, "llama")


@pytest.mark.parametrize("value", ["4", True, float("nan"), [4.0]])
def test_gguf_numbers_are_numbers(value: Any) -> None:
    with pytest.raises(InputError, match=r"llama\.rope\.scaling\.factor is .* expected a number"):
        rope_from_gguf({f"{SCALING}.factor": value}, "llama")
