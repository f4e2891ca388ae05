"""Opening checkpoints: Hugging Face directories and GGUF files, complete or refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint, open_checkpoint
from dsq.convert.names import expected_tensors, gguf_name
from dsq.convert.rope import Rope
from dsq.convert.spec import spec_from_config
from dsq.errors import DsqError, InputError, UnsupportedError
from tests.models import TINY_CODER

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
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


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


def shard(folder: Path) -> tuple[Path, dict[str, str]]:
    """A checkpoint in two shards, and its weight_map."""
    write_config(folder)
    weights = weights_of()
    names = sorted(weights)
    weight_map = {}
    for i, part in enumerate((names[:9], names[9:]), 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    write_index(folder, weight_map)
    return folder, weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(source: Path, message: str, kind: type[DsqError] = InputError) -> None:
    with pytest.raises(kind) as caught:
        open_checkpoint(source)
    assert message in str(caught.value)
    assert str(source) in str(caught.value)
    assert "\n" not in str(caught.value)


# Hugging Face


def test_hf(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    checkpoint = open_checkpoint(hf(tmp_path))
    assert isinstance(checkpoint, HfCheckpoint)
    assert (checkpoint.path, checkpoint.format) == (tmp_path, "hf")
    assert checkpoint.config == CONFIG
    assert checkpoint.spec.rope == Rope(100000.0, "linear", 4.0)
    assert checkpoint.spec.eos_ids == (2, 3)
    weights = weights_of()
    assert set(checkpoint.tensors) == set(weights)
    for name, values in weights.items():
        assert checkpoint.data(name).tobytes() == values.tobytes()
    with pytest.raises(InputError, match="there is no tensor 'x'"):
        checkpoint.data("x")


def test_shards(tmp_path: Path) -> None:
    folder, _ = shard(tmp_path)
    (folder / "consolidated.safetensors").write_bytes(b"Meta's naming, not read")
    checkpoint = open_checkpoint(folder)
    for name, values in weights_of().items():
        assert checkpoint.data(name).tobytes() == values.tobytes()
    assert len({t.path for t in checkpoint.tensors.values()}) == 2


def test_rotary_buffers_are_left_out(tmp_path: Path) -> None:
    hf(tmp_path)
    path = tmp_path / "model.safetensors"
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    extra = {name.format(0): np.zeros(2, np.float32), name.format(1): np.zeros(2)}
    save_file({**load_file(path), **extra}, path)
    assert set(open_checkpoint(tmp_path).tensors) == set(weights_of())


def test_tied_model_with_lm_head(tmp_path: Path) -> None:
    hf(tmp_path, tie_word_embeddings=True)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    assert HEAD not in weights
    save_file({**weights, HEAD: weights[EMBED].copy()}, path)
    assert HEAD not in open_checkpoint(tmp_path).tensors
    save_file({**weights, HEAD: weights[EMBED] + 1}, path)
    checkpoint = open_checkpoint(tmp_path)  # headers only: the weights are not looked at
    with pytest.raises(InputError, match=r"says tie_word_embeddings, but lm_head\.weight differs"):
        checkpoint.data(EMBED)
    save_file({**weights, HEAD: weights[EMBED].reshape(16, 11)}, path)
    checkpoint = open_checkpoint(tmp_path)  # headers only: the weights are not looked at
    with pytest.raises(InputError, match=r"says tie_word_embeddings, but lm_head\.weight differs"):
        checkpoint.data(EMBED)
    weights[HEAD] = weights.pop(EMBED)
    save_file(weights, path)
    refused(tmp_path, "tensor 'model.embed_tokens.weight' is missing")


def test_biases(tmp_path: Path) -> None:
    spec = open_checkpoint(hf(tmp_path, attention_bias=True, mlp_bias=True)).spec
    assert spec.attention_bias
    assert spec.mlp_bias
    write_config(tmp_path, {**CONFIG, "mlp_bias": True})
    refused(tmp_path, "config.json says attention_bias false, but the weights have model.layers.0")
    hf(tmp_path)
    write_config(tmp_path, {**CONFIG, "mlp_bias": True})
    refused(tmp_path, "says mlp_bias true, but the weights lack model.layers.0.mlp.gate_proj.bias")


Change = Callable[[Weights], Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), "tensor 'model.norm.weight' is missing"),
        (lambda w: w.pop(HEAD), "tensor 'lm_head.weight' is missing"),
        (
            lambda w: w.update({EMBED: np.zeros((12, 16), np.float32)}),
            "'model.embed_tokens.weight' has shape [12, 16]; the config asks for [11, 16]",
        ),
        (
            lambda w: w.update({QUERY: np.zeros((8, 32), np.float32)}),
            "q_proj.weight' has shape [8, 32]; the config asks for [16, 16]",
        ),
        (
            lambda w: w.update({"model.layers.0.extra.weight": np.zeros(2, np.float32)}),
            "tensor 'model.layers.0.extra.weight' is none of a Llama of this config",
        ),
        (
            lambda w: w.update({"model.layers.2.mlp.up_proj.weight": np.zeros(2, np.float32)}),
            "the config says 2 layers, the weights 3",
        ),
    ],
)
def test_weights_that_do_not_fit(change: Change, message: str, tmp_path: Path) -> None:
    hf(tmp_path)
    weights = weights_of()
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    refused(tmp_path, message)


def test_absurd_layer_count_is_refused_at_once(tmp_path: Path) -> None:
    hf(tmp_path)
    write_config(tmp_path, {**CONFIG, "num_hidden_layers": 10**12})
    refused(tmp_path, "the config says 1000000000000 layers, the weights 2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"a": 1,\n}', "config.json: not valid JSON: line 3: "),
        ("[]", "config.json: holds a JSON list; expected an object"),
        ('{"hidden_size": 1, "hidden_size": 2}', "the key 'hidden_size' is given twice"),
        ('{"rms_norm_eps": NaN}', "NaN is no JSON"),
        ("{}", "config.json: num_attention_heads is missing"),
        (json.dumps({**CONFIG, "vocab_size": "11"}), "vocab_size is '11'; expected an integer"),
        (json.dumps({**CONFIG, "head_dim": 3}), "head_dim is 3; RoPE needs an even number"),
        (json.dumps({**CONFIG, "num_key_value_heads": 3}), "do not divide by 3 KV heads"),
        (json.dumps({**CONFIG, "rms_norm_eps": None}), "rms_norm_eps is None"),
        (json.dumps({**CONFIG, "num_attention_heads": 0}), "n_head is 0; it must be positive"),
    ],
)
def test_bad_config(text: str, message: str, tmp_path: Path) -> None:
    hf(tmp_path)
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, message)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["MixtralForCausalLM"]},
        {"architectures": 7},
        {"model_type": "qwen2"},
        {"hidden_act": "gelu"},
        {"quantization_config": {"quant_method": "gptq"}},
        {"quantization_config": [1]},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ],
)
def test_unsupported_config(changes: dict[str, Any], tmp_path: Path) -> None:
    hf(tmp_path)
    write_config(tmp_path, {**CONFIG, **changes})
    refused(
        tmp_path,
        "not supported" if "quant" not in str(changes) else "quantized already",
        UnsupportedError,
    )


def test_missing_files(tmp_path: Path) -> None:
    refused(tmp_path / "none", "there is no such file or directory")
    refused(tmp_path, "config.json is missing")
    write_config(tmp_path)
    refused(tmp_path, "no weights: expected model.safetensors or pytorch_model.bin")
    refused(tmp_path / "config.json", "neither a directory nor a .gguf file")


def test_index_errors(tmp_path: Path) -> None:
    folder, weight_map = shard(tmp_path)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert weight_map[HEAD] == first
    for wrong, message in (
        ([], "weight_map is missing or empty"),
        ({**weight_map, HEAD: "../x.safetensors"}, "no plain file name"),
        ({**weight_map, HEAD: 3}, "no plain file name"),
        ({**weight_map, HEAD: second}, "says that tensor 'lm_head.weight' is in " + second),
        ({**weight_map, "x": first}, "says that tensor 'x' is in " + first),
        ({k: v for k, v in weight_map.items() if k != HEAD}, "'lm_head.weight' is not in model.s"),
    ):
        write_index(folder, wrong)
        refused(folder, message)
    write_index(folder, weight_map)
    weights = load_file(folder / second)
    save_file({**weights, HEAD: np.zeros(2, np.float32)}, folder / second)
    refused(folder, f"tensor 'lm_head.weight' is in {first} as well")
    (folder / second).unlink()
    refused(folder, f"{second}: missing, but model.safetensors.index.json lists it")


# pytorch_model.bin


def torch_weights(torch: Any, weights: Weights) -> dict[str, Any]:
    return {name: torch.from_numpy(w).to(torch.bfloat16) for name, w in weights.items()}


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
def test_bin(zipped: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    write_config(tmp_path)
    weights = torch_weights(torch, weights_of())
    stored = {**weights, EMBED: weights[EMBED].t().contiguous().t()}  # same values, other strides
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2, dtype=torch.float64)
    path = tmp_path / "pytorch_model.bin"
    torch.save(stored, path, _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(weights)
    for name, tensor in weights.items():
        info = checkpoint.tensors[name]
        assert (info.type.name, info.path, info.shape) == ("bf16", path, tuple(tensor.shape))
        data = checkpoint.data(name)
        assert (data.dtype, data.ndim, data.size) == (np.uint8, 1, info.n_bytes)
        assert data.tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.torch
def test_bin_shards_and_tied(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    config = {**CONFIG, "tie_word_embeddings": True}
    write_config(tmp_path, config)
    weights = torch_weights(torch, weights_of(config))
    weights[HEAD] = weights[EMBED]
    names = sorted(weights)
    parts = {"a.bin": names[:4], "b.bin": names[4:]}
    for file, part in parts.items():
        torch.save({name: weights[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert set(open_checkpoint(tmp_path).tensors) == set(weights) - {HEAD}
    save_file(weights_of(config), tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).tensors[EMBED].path.name == "model.safetensors"


class Evil:
    def __reduce__(self) -> Any:
        return Path.write_text, (Path(os.environ["DSQ_TEST_EVIL"]), "ran")


@pytest.mark.torch
def test_bad_bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSQ_TEST_EVIL", str(tmp_path / "ran"))
    torch = pytest.importorskip("torch")
    write_config(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": Evil()}, path)
    refused(tmp_path, "torch cannot load the weights")
    assert not (tmp_path / "ran").exists()
    for content, message in (
        ({"a": 3}, "entry 'a' is a int; expected a tensor"),
        ([torch.zeros(2)], "holds a list; expected names and tensors"),
        ({"a": torch.zeros(2, dtype=torch.int32)}, "tensor 'a' is of type torch.int32"),
        ({"a": torch.zeros(2).to_sparse()}, "tensor 'a' is sparse"),
    ):
        torch.save(content, path)
        refused(tmp_path, message)
    torch.save(torch_weights(torch, weights_of()), path)
    whole = path.read_bytes()
    for n in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:n])
        refused(tmp_path, "torch cannot load the weights")


def test_bin_without_torch(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from dsq.convert.checkpoint import open_checkpoint\n"
        "from dsq.errors import DsqError\n"
        "try: open_checkpoint(sys.argv[1])\n"
        "except DsqError as error: print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "needs torch; pip install 'dsq[torch]'" in run.stdout


def test_opening_imports_neither_torch_nor_the_hub(tmp_path: Path) -> None:
    heavy = "torch", "transformers", "safetensors", "gguf", "llama_cpp", "huggingface_hub"
    code = (
        "import sys\n"
        "from dsq.convert.checkpoint import open_checkpoint\n"
        "from dsq.convert import hub\n"
        "open_checkpoint(hub.resolve(sys.argv[1]))\n"
        f"print([name for name in {heavy} if name in sys.modules])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(hf(tmp_path))], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


# GGUF


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
