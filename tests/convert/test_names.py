"""Names go both ways, and shapes are those of transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dsq.convert.names import expected_tensors, gguf_name, hf_name, is_ignored, permuted_heads
from dsq.convert.spec import ModelSpec, spec_from_config
from dsq.errors import InputError

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 24,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 11,
    "head_dim": 8,
}
SPEC = spec_from_config(CONFIG)


@pytest.mark.parametrize(
    ("hf", "gguf"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.3.input_layernorm.weight", "blk.3.attn_norm.weight"),
        ("model.layers.3.self_attn.q_proj.weight", "blk.3.attn_q.weight"),
        ("model.layers.3.self_attn.k_proj.weight", "blk.3.attn_k.weight"),
        ("model.layers.0.self_attn.v_proj.bias", "blk.0.attn_v.bias"),
        ("model.layers.10.self_attn.o_proj.weight", "blk.10.attn_output.weight"),
        ("model.layers.3.post_attention_layernorm.weight", "blk.3.ffn_norm.weight"),
        ("model.layers.3.mlp.gate_proj.weight", "blk.3.ffn_gate.weight"),
        ("model.layers.3.mlp.up_proj.weight", "blk.3.ffn_up.weight"),
        ("model.layers.3.mlp.down_proj.bias", "blk.3.ffn_down.bias"),
    ],
)
def test_names_both_ways(hf: str, gguf: str) -> None:
    assert gguf_name(hf) == gguf
    assert hf_name(gguf) == hf


@pytest.mark.parametrize(
    "name",
    [
        "",
        "model.layers.3.self_attn.q_proj.weight2",
        "model.layers.03.self_attn.q_proj.weight",
        "model.layers.x.self_attn.q_proj.weight",
        "model.layers.3.block_sparse_moe.gate.weight",
        "blk.3.ffn_gate_exps.weight",
        "blk.3.attn_q.weight\n",
        "rope_freqs.weight",
        "transformer.h.0.attn.weight",
    ],
)
def test_unknown_names_are_refused(name: str) -> None:
    for translate in (gguf_name, hf_name):
        with pytest.raises(InputError, match="is no tensor of a Llama"):
            translate(name)


@pytest.mark.parametrize(
    "changes", [{}, {"tied": True}, {"attention_bias": True, "mlp_bias": True}]
)
def test_every_expected_name_has_a_gguf_name(changes: dict[str, bool]) -> None:
    names = expected_tensors(replace(SPEC, **changes))
    assert [hf_name(gguf_name(name)) for name in names] == list(names)


@pytest.mark.torch
@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}]
)
def test_expected_tensors_are_those_of_transformers(changes: dict[str, bool]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = {**CONFIG, **changes}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    theirs = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert expected_tensors(spec_from_config(config)) == theirs


def test_permuted_heads() -> None:
    spec: ModelSpec = SPEC
    assert permuted_heads("blk.1.attn_q.weight", spec) == 4
    assert permuted_heads("blk.1.attn_k.weight", spec) == 2
    assert permuted_heads("blk.1.attn_q.bias", spec) == 4
    for name in ("attn_v.weight", "attn_output.weight", "ffn_up.weight", "attn_norm.weight"):
        assert permuted_heads(f"blk.1.{name}", spec) is None
    assert permuted_heads("output.weight", spec) is None


def test_ignored() -> None:
    assert is_ignored("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert is_ignored("model.rotary_emb.inv_freq")
    assert not is_ignored("model.layers.0.self_attn.q_proj.weight")
