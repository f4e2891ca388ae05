"""GPTQ and EXL2 directories that tests make for themselves: rounded to nearest, no calibration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from dsq.quant import exl2_layout, gptq_layout
from dsq.quant.exl2_layout import Exl2Tensor
from dsq.quant.gptq_layout import GptqTensor
from tests.models import TINY_CODER, llama_config, random_weights

Codes = GptqTensor | Exl2Tensor


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def gptq_rounded(
    weight: np.ndarray,
    bits: int = 4,
    group_size: int = 64,
    *,
    sym: bool = True,
    g_idx: np.ndarray | None = None,
) -> GptqTensor:
    """(n_out, n_in) float32, rounded to nearest in each group of inputs."""
    n_out, n_in = weight.shape
    size = n_in if group_size == -1 else group_size
    g_idx = np.arange(n_in) // size if g_idx is None else g_idx
    n_groups, top = int(g_idx.max()) + 1, (1 << bits) - 1
    scales = np.empty((n_groups, n_out), dtype=np.float16)
    zeros = np.full((n_groups, n_out), 1 << (bits - 1), dtype=np.uint8)
    codes = np.empty((n_in, n_out), dtype=np.uint8)
    for g in range(n_groups):
        rows = weight[:, g_idx == g].T
        low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
        if sym:
            scales[g] = 2 * np.maximum(-low, high) / top
        else:
            scales[g] = (high - low) / top
            zeros[g] = np.clip(np.rint(-low / scales[g].astype(np.float32)), 1, top)
        steps = np.rint(rows / scales[g].astype(np.float32)) + zeros[g]
        codes[g_idx == g] = np.clip(steps, 0, top)
    return GptqTensor(codes, zeros, scales, g_idx.astype(np.int32), bits)


def exl2_rounded(weight: np.ndarray, groups: list[tuple[int, int]], seed: int = 0) -> Exl2Tensor:
    """(n_out, n_in) float32, rounded to nearest in groups of (bits, rows) of permuted inputs."""
    perm = np.random.default_rng(seed).permutation(weight.shape[1])
    rows = weight.T[perm]
    codes, scale_codes, scale_max, start = [], [], [], 0
    for bits, n in groups:
        part = rows[start : start + n]
        wanted = np.abs(part).max(0) / (1 << (bits - 1))
        largest = np.float16(wanted.max())
        code = np.clip(np.ceil(16 * np.sqrt(wanted / np.float32(largest))) - 1, 0, 15)
        scale = exl2_layout.scale_values(code.astype(np.uint8), np.full(code.shape, largest))
        half = 1 << (bits - 1)
        codes.append(np.clip(np.rint(part / scale) + half, 0, 2 * half - 1).astype(np.uint8))
        scale_codes.append(code.astype(np.uint8))
        scale_max.append(largest)
        start += n
    return Exl2Tensor(
        np.concatenate(codes),
        np.array([bits for bits, _ in groups]),
        np.array([n for _, n in groups]),
        np.stack(scale_codes),
        np.array(scale_max, dtype=np.float16),
        np.argsort(perm).astype(np.int32),
    )


def write_packed(
    folder: Path,
    quantize: Callable[[str, np.ndarray], Codes | None],
    quantization_config: dict[str, Any],
    *,
    config: dict[str, Any] | None = None,
    file: str = "model.safetensors",
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """A directory with tiny-coder's tokenizer; `quantize` packs a matrix, or leaves it (None).

    Returns the float32 weights that it stands for, by their dense names.
    """
    config = config or llama_config(torch_dtype="float16")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_CODER / name, folder)
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": quantization_config})
    )
    stored: dict[str, np.ndarray] = {}
    meant: dict[str, np.ndarray] = {}
    checkpoint_format = quantization_config.get("checkpoint_format", "gptq")
    for name, weight in random_weights(config, seed).items():
        codes = quantize(name, weight)
        if codes is None:
            stored[name] = weight.astype(np.float16)
            meant[name] = stored[name].astype(np.float32)
            continue
        if isinstance(codes, GptqTensor):
            parts = gptq_layout.pack(codes, checkpoint_format)
        else:
            parts = exl2_layout.pack(codes)
        module = name.removesuffix(".weight")
        stored |= {f"{module}.{part}": np.ascontiguousarray(v) for part, v in parts.items()}
        meant[name] = codes.dequantized()
    save_file(stored, folder / file)
    return meant


def gptq_config(**changes: Any) -> dict[str, Any]:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False}
    return {**config, **changes}


def write_gptq(folder: Path, *, config: dict[str, Any] | None = None, **settings: Any) -> dict:
    """A GPTQ directory of `gptq_config(**settings)`; see `write_packed` for what is returned."""
    said = gptq_config(**settings)

    def quantize(name: str, weight: np.ndarray) -> GptqTensor | None:
        if not is_linear(name):
            return None
        g_idx = None
        if said["desc_act"]:
            order = np.random.default_rng(len(name)).permutation(weight.shape[1])
            g_idx = order // said["group_size"]
        return gptq_rounded(weight, said["bits"], said["group_size"], sym=said["sym"], g_idx=g_idx)

    return write_packed(folder, quantize, said, config=config)


def write_exl2(folder: Path, *, config: dict[str, Any] | None = None, **kwargs: Any) -> dict:
    """An EXL2 directory of mixed groups, the head at 6 bits."""

    def quantize(name: str, weight: np.ndarray) -> Exl2Tensor | None:
        n_in = weight.shape[-1]
        if name == "lm_head.weight":
            return exl2_rounded(weight, [(6, 128)] * (n_in // 128))
        if not is_linear(name):
            return None
        mixed = [(8, 32), (5, 64), (4, 64), (3, 32)]
        return exl2_rounded(weight, [*mixed, *[(2, 64)] * ((n_in - 192) // 64)])

    said = {"quant_method": "exl2", "version": "0.3.2", "bits": 4.0, "head_bits": 6}
    return write_packed(folder, quantize, said, config=config, **kwargs)
