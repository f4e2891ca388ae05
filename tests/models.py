"""Models that tests make for themselves, and the one that the repository ships."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from dsq.convert.names import expected_tensors
from dsq.convert.spec import spec_from_config

ROOT = Path(__file__).parents[1]
TINY_CODER = ROOT / "models" / "tiny-coder"

LINEAR_4 = {"rope_theta": 100000, "rope_scaling": {"type": "linear", "factor": 4.0}}


def llama_config(**changes: Any) -> dict[str, Any]:
    """A small Llama with DeepSeek Coder's RoPE and tiny-coder's vocabulary rows."""
    rows = json.loads((TINY_CODER / "config.json").read_text())["vocab_size"]
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": json.loads((TINY_CODER / "config.json").read_text())["bos_token_id"],
        "eos_token_id": json.loads((TINY_CODER / "config.json").read_text())["eos_token_id"],
        "hidden_act": "silu",
        "hidden_size": 256,
        "intermediate_size": 512,
        "max_position_embeddings": 16384,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": rows,
        **LINEAR_4,
    }
    config.update(changes)
    return {key: value for key, value in config.items() if value is not None}


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """float32 weights by HF name; scaled so that activations stay near one."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in expected_tensors(spec_from_config(config)).items():
        if name.endswith("norm.weight"):
            weights[name] = 1 + 0.1 * rng.standard_normal(shape, dtype=np.float32)
        elif len(shape) == 1:
            weights[name] = 0.1 * rng.standard_normal(shape, dtype=np.float32)
        else:
            scale = 1.0 if "embed" in name else shape[-1] ** -0.5
            weights[name] = np.float32(scale) * rng.standard_normal(shape, dtype=np.float32)
    return weights


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 → bfloat16 bits (uint16), rounded to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_safetensors(path: Path, weights: dict[str, np.ndarray], dtype: str) -> None:
    """Write float32 `weights` as `dtype` ("F32", "F16" or "BF16")."""
    if dtype == "F32":
        save_file(weights, path)
    elif dtype == "F16":
        save_file({n: w.astype(np.float16) for n, w in weights.items()}, path)
    else:
        # numpy has no bfloat16: save the bits as F16 and rename the type in the header,
        # whose length does not change with one character more if a space is taken away.
        save_file({n: to_bf16(w).view(np.float16) for n, w in weights.items()}, path)
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + size].replace(b'"F16"', b'"BF16"').rstrip(b" ")
        header += b" " * (-len(header) % 8)
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


def write_hf(
    folder: Path, config: dict[str, Any] | None = None, *, dtype: str = "BF16", seed: int = 0
) -> Path:
    """A random checkpoint with tiny-coder's tokenizer, in `folder`."""
    config = config or llama_config()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_CODER / name, folder)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", random_weights(config, seed), dtype)
    return folder
