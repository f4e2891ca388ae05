"""GGUF → Hugging Face: weights exact, RoPE factor found by every reader, tokenizer whole."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.hf import writer
from dsq.convert.hf.writer import plan_to_hf, write_hf
from dsq.convert.pipeline import plan_gguf, run_gguf_plan
from dsq.errors import InputError
from dsq.quant.presets import PRESETS
from tests import models
from tests.exllamav2_config import by_its_rules
from tests.models import TINY_CODER, llama_config, random_weights

SHAPES = {
    "MHA": {},
    "GQA": {"num_key_value_heads": 2},
    "MQA": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
    "explicit head_dim": {"head_dim": 32, "num_key_value_heads": 2},
}


def to_gguf(source, out, preset):
    checkpoint = open_checkpoint(source)
    run_gguf_plan(checkpoint, plan_gguf(checkpoint, PRESETS[preset]), out)
    return out


def to_hf(source, out, outtype="auto"):
    checkpoint = open_checkpoint(source)
    write_hf(checkpoint, plan_to_hf(checkpoint, outtype), out)
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back_is_exact(tmp_path, shape):
    config = llama_config(**SHAPES[shape])
    source = models.write_hf(tmp_path / "hf", config, dtype="F32")
    back = to_hf(to_gguf(source, tmp_path / "m.gguf", "f32"), tmp_path / "back")
    weights = load_file(back / "model.safetensors")
    expected = random_weights(config)
    assert set(weights) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(weights[name], values, err_msg=name)
    assert open_checkpoint(back).spec.rope == open_checkpoint(source).spec.rope


def test_a_quantized_gguf_comes_back_dequantized(tmp_path):
    source = models.write_hf(tmp_path / "hf", dtype="F32")
    back = to_hf(to_gguf(source, tmp_path / "m.gguf", "q8_0"), tmp_path / "back")
    with safe_open(back / "model.safetensors", "np") as file:
        got = file.get_tensor("model.layers.1.self_attn.q_proj.weight")
    want = random_weights(llama_config())["model.layers.1.self_attn.q_proj.weight"]
    assert got.dtype == np.float32
    assert 0 < np.abs(got - want).max() < 0.02 * np.abs(want).max()


@pytest.fixture(scope="module")
def tiny_hf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return to_hf(to_gguf(TINY_CODER, folder / "m.gguf", "bf16"), folder / "tiny-coder")


def test_the_factor_is_found_by_exllamav2s_rules(tiny_hf):
    assert by_its_rules(tiny_hf) == (100000, 4)


@pytest.mark.torch
def test_the_factor_is_found_by_transformers(tiny_hf):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_hf)
    inv_freq = model.model.rotary_emb.inv_freq.numpy()
    dim = 2 * len(inv_freq)
    np.testing.assert_allclose(inv_freq, 100000.0 ** -(np.arange(0, dim, 2) / dim) / 4, rtol=1e-5)


def test_the_generation_config_carries_the_variants_ids(tiny_hf):
    ids = json.loads((tiny_hf / "generation_config.json").read_text())
    config = json.loads((TINY_CODER / "config.json").read_text())
    assert ids["eos_token_id"] == config["eos_token_id"]
    assert ids["bos_token_id"] == config["bos_token_id"]


def test_the_tokenizer_encodes_as_before(tiny_hf):
    from tokenizers import Tokenizer

    text = "def f(x):\n    return x + 1  # größer 中文 123\n"
    before = Tokenizer.from_file(str(TINY_CODER / "tokenizer.json"))
    after = Tokenizer.from_file(str(tiny_hf / "tokenizer.json"))
    bos = json.loads((TINY_CODER / "config.json").read_text())["bos_token_id"]
    assert after.encode(text).ids == [bos, *before.encode(text).ids]


def test_large_models_are_sharded_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_BYTES", 4 << 20)
    back = to_hf(to_gguf(TINY_CODER, tmp_path / "m.gguf", "bf16"), tmp_path / "back")
    index = json.loads((back / "model.safetensors.index.json").read_text())
    names = set()
    for file in set(index["weight_map"].values()):
        with safe_open(back / file, "np") as shard:
            names |= set(shard.keys())
    assert names == set(index["weight_map"])
    assert len(set(index["weight_map"].values())) > 2
    assert set(open_checkpoint(back).tensors) == names


def test_a_quantized_outtype_is_refused(tmp_path):
    gguf = to_gguf(TINY_CODER, tmp_path / "m.gguf", "bf16")
    with pytest.raises(InputError, match="choose auto, f32, f16 or bf16"):
        plan_to_hf(open_checkpoint(gguf), "q4_0")
