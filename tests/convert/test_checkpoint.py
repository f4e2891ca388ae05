"""Opening checkpoints: Hugging Face directories, complete or refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsq.convert.checkpoint import HfCheckpoint, open_checkpoint
from dsq.convert.rope import Rope
from dsq.errors import InputError, UnsupportedError
from tests.convert.tiny_checkpoints import CONFIG, Weights, hf, refused, weights_of, write_config

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


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
        {"quantization_config": {"quant_method": "awq"}},
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
