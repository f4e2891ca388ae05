"""Opening GGUF files as checkpoints: the spec, refusals, directories that hold one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from dsq.convert.checkpoint import GgufCheckpoint, open_checkpoint
from dsq.convert.names import gguf_name
from dsq.convert.rope import Rope
from dsq.convert.spec import spec_from_config
from dsq.errors import UnsupportedError
from tests.convert.tiny_checkpoints import CONFIG, Weights, hf, refused, weights_of, write_config
from tests.models import TINY_CODER


def write_gguf(
    path: Path,
    weights: Weights,
    metadata: dict[str, Any] | None = None,
    arch: str = "llama",
) -> Path:
    """Keys of CONFIG under llama.*; `metadata` overrides them, None takes one away."""
    values: dict[str, Any] = {
        "llama.block_count": 2,
        "llama.context_length": 64,
        "llama.embedding_length": 16,
        "llama.feed_forward_length": 40,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.rope.dimension_count": 4,
        "llama.rope.freq_base": 100000.0,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    values.update(metadata or {})
    writer = gguf.GGUFWriter(path, arch)
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, tensor in weights.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_weights(**changes: Any) -> Weights:
    return {gguf_name(name): w for name, w in weights_of({**CONFIG, **changes}).items()}


def test_gguf_has_the_spec_of_its_hf_source(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", gguf_weights())
    checkpoint = open_checkpoint(str(path))
    assert isinstance(checkpoint, GgufCheckpoint)
    assert checkpoint.format == "gguf"
    assert checkpoint.spec == spec_from_config({**CONFIG, "torch_dtype": "float32"})
    for name, values in gguf_weights().items():
        assert checkpoint.data(name).tobytes() == values.tobytes()


def test_gguf_tied_biases_and_defaults(tmp_path: Path) -> None:
    changes = {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 4}
    metadata = dict.fromkeys(
        (
            "llama.attention.head_count_kv",
            "llama.rope.dimension_count",
            "tokenizer.ggml.bos_token_id",
            "tokenizer.ggml.eos_token_id",
        )
    )
    path = write_gguf(tmp_path / "m.gguf", gguf_weights(**changes), metadata)
    spec = open_checkpoint(path).spec
    assert (spec.tied, spec.attention_bias, spec.mlp_bias) == (True, True, False)
    assert (spec.n_head_kv, spec.head_dim) == (4, 4)
    assert (spec.bos_id, spec.eos_ids) == (None, ())


def test_gguf_head_dim_from_key_length(tmp_path: Path) -> None:
    weights = gguf_weights(head_dim=8)
    metadata = {"llama.attention.key_length": 8, "llama.rope.dimension_count": 8}
    assert open_checkpoint(write_gguf(tmp_path / "m.gguf", weights, metadata)).spec.head_dim == 8
    without = write_gguf(tmp_path / "n.gguf", weights, {"llama.rope.dimension_count": 8})
    assert open_checkpoint(without).spec.head_dim == 8


def test_gguf_llama3(tmp_path: Path) -> None:
    llama3 = Rope(100000.0, "llama3", 8.0, 8192, 1.0, 4.0)
    changes: dict[str, Any] = {"hidden_size": 256}
    weights = gguf_weights(**changes)
    weights["rope_freqs.weight"] = llama3.freq_factors(64).astype(np.float32)
    metadata: dict[str, Any] = {
        "llama.embedding_length": 256,
        "llama.rope.dimension_count": 64,
        "llama.rope.scaling.type": None,
        "llama.rope.scaling.factor": None,
    }
    path = write_gguf(tmp_path / "m.gguf", weights, metadata)
    assert open_checkpoint(path).spec.rope == llama3
    weights["rope_freqs.weight"] = np.ones(16, np.float32)
    refused(write_gguf(path, weights, metadata), "'rope_freqs.weight' is f32 of shape [16]")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
        ({"llama.context_length": "64"}, "llama.context_length is '64'; expected an integer"),
        ({"llama.attention.layer_norm_rms_epsilon": 1}, "expected a float"),
        ({"llama.block_count": 3}, "the config says 3 layers, the weights 2"),
        ({"llama.feed_forward_length": 41}, "ffn_gate.weight' has shape [40, 16]"),
        ({"llama.attention.head_count": 0}, "does not divide by llama.attention.head_count 0"),
    ],
)
def test_gguf_metadata_that_is_wrong(
    metadata: dict[str, Any], message: str, tmp_path: Path
) -> None:
    refused(write_gguf(tmp_path / "m.gguf", gguf_weights(), metadata), message)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, "llama.expert_count asks for a mixture of experts"),
        ({"llama.attention.head_count_kv": [2, 1]}, "head_count_kv differs by layer"),
        ({"llama.rope.dimension_count": 2, "llama.attention.key_length": 4}, "partial rotation"),
        ({"llama.attention.value_length": 8}, "value_length is 8"),
        ({"llama.rope.scaling.type": "longrope"}, "type is 'longrope'"),
    ],
)
def test_gguf_that_is_unsupported(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", gguf_weights(), metadata)
    refused(path, message, UnsupportedError)


def test_gguf_architecture(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", gguf_weights(), arch="qwen2")
    refused(path, "general.architecture is 'qwen2', which is not supported", UnsupportedError)


def test_gguf_tensors_that_do_not_fit(tmp_path: Path) -> None:
    path, weights = tmp_path / "m.gguf", gguf_weights()
    for changed, message in (
        ({**weights, "extra.weight": np.zeros(2, np.float32)}, "tensor 'extra.weight' is no tens"),
        (
            {k: w for k, w in weights.items() if "ffn_up" not in k},
            "'blk.0.ffn_up.weight' is missing",
        ),
        ({k: w for k, w in weights.items() if "token" not in k}, "'token_embd.weight' is missing"),
    ):
        refused(write_gguf(path, changed), message)


def test_vocabularies(tmp_path: Path) -> None:
    tiny = open_checkpoint(TINY_CODER)
    assert len(tiny.vocabulary().tokens) == tiny.spec.n_vocab
    tokens = (*"abcdefghij", "ab")
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": [1] * 11,
        "tokenizer.ggml.merges": ["a b"],
    }
    path = write_gguf(tmp_path / "m.gguf", gguf_weights(), metadata)
    vocabulary = open_checkpoint(path).vocabulary(pre="deepseek-coder")
    assert (vocabulary.tokens, vocabulary.pre) == (tokens, "deepseek-coder")


# A directory that holds exactly one model


def test_directory_with_gguf(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "m-Q4_0.gguf", gguf_weights())
    write_config(tmp_path)  # hub repositories of GGUFs carry one
    assert open_checkpoint(tmp_path).path == first
    write_gguf(tmp_path / "m-Q8_0.gguf", gguf_weights())
    refused(tmp_path, "holds 2 GGUF models; give one of them: m-Q4_0.gguf, m-Q8_0.gguf")
    hf(tmp_path)
    assert open_checkpoint(tmp_path).format == "hf"


def test_directory_with_a_split_gguf(tmp_path: Path) -> None:
    first = write_gguf(
        tmp_path / "m-00001-of-00002.gguf", gguf_weights(), {"split.no": 0, "split.count": 2}
    )
    write_gguf(tmp_path / "m-00002-of-00002.gguf", {}, {"split.no": 1, "split.count": 2})
    assert open_checkpoint(tmp_path).path == first
    write_gguf(tmp_path / "best-of-both.gguf", gguf_weights())
    refused(tmp_path, "holds 2 GGUF models; give one of them: best-of-both.gguf, m-00001-of-00002")


def test_gguf_is_known_by_its_magic(tmp_path: Path) -> None:
    blob = write_gguf(tmp_path / "sha256-abc", gguf_weights())  # as Ollama stores models
    assert open_checkpoint(blob).format == "gguf"
