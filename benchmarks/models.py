"""The checkpoints that are measured: SmolLM2, and random ones in the shapes of DeepSeek Coder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from benchmarks.peers import SMOLLM2_GGUF
from dsq.convert.names import expected_tensors
from dsq.convert.spec import spec_from_config

# SmolLM2's tokenizer has 49,152 tokens where DeepSeek Coder has 32,256 rows. The converter of
# llama.cpp refuses a tokenizer that it does not know, and a model with fewer rows than tokens.
ROWS = 49_152
SHARD_BYTES = 2_000_000_000
DITHER = "0.3"
_TILE_VALUES = (1 << 24) + 4099  # not a multiple of any row: no two rows of a tensor are equal
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes. 1.3b and 6.7b are DeepSeek Coder's, but for the rows of the vocabulary."""

    name: str
    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int

    def config(self, like: dict[str, Any]) -> dict[str, Any]:
        """config.json; the special ids come from `like`, whose tokenizer it uses."""
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **{key: like[key] for key in ids if like.get(key) is not None},
            "hidden_act": "silu",
            "hidden_size": self.n_embd,
            "intermediate_size": self.n_ff,
            "max_position_embeddings": 16384,
            "num_attention_heads": self.n_head,
            "num_hidden_layers": self.n_layer,
            "num_key_value_heads": self.n_head,
            "rms_norm_eps": 1e-6,
            "rope_theta": 100000,
            "rope_scaling": {"type": "linear", "factor": 4.0},
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": ROWS,
        }


SHAPES = {
    "1.3b": Shape("1.3b", n_embd=2048, n_ff=5504, n_layer=24, n_head=16),
    "6.7b": Shape("6.7b", n_embd=4096, n_ff=11008, n_layer=32, n_head=32),
    # For --quick: the same ragged rows of ffn_down (5504 and 11008 are no multiples of 256).
    "tiny": Shape("tiny", n_embd=256, n_ff=352, n_layer=2, n_head=4),
    "small": Shape("small", n_embd=512, n_ff=1376, n_layer=2, n_head=8),
}


def smollm2(folder: Path) -> Path:
    """SmolLM2 as a bf16 Hugging Face directory, off its old Q4_1 grid by seeded noise."""
    out = folder / "smollm2"
    if not out.exists():
        need(folder, 300_000_000)
        options = ["--to", "hf", "--outtype", "bf16", "--dither", DITHER, "-o", str(out), "--json"]
        dsq = [sys.executable, "-m", "dsq.cli.main", "convert", str(SMOLLM2_GGUF), *options]
        subprocess.run(dsq, check=True, stdout=subprocess.DEVNULL)
    return out


def random_checkpoint(folder: Path, shape: Shape, *, holes: bool = False) -> Path:
    """A sharded bf16 checkpoint of `shape` with SmolLM2's tokenizer, made in bounded memory.

    With `holes` the files have their headers and their sizes but no data: for what reads headers
    only.
    """
    out = folder / (f"{shape.name}-holes" if holes else shape.name)
    if out.exists():
        return out
    source = smollm2(folder)
    config = shape.config(json.loads((source / "config.json").read_text()))
    tensors = expected_tensors(spec_from_config(config))
    need(folder, 0 if holes else 2 * sum(map(prod, tensors.values())))
    building = out.with_name(out.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    for name in _TOKENIZER_FILES:
        shutil.copy(source / name, building)
    (building / "config.json").write_text(json.dumps(config, indent=2))
    _write_shards(building, tensors, None if holes else _Noise(seed=0))
    building.rename(out)
    return out


def weight_files(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob("*.safetensors"))


def size_bytes(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in weight_files(checkpoint))


def need(folder: Path, n_bytes: int) -> None:
    """Stop now rather than at the end, when the disk is too small."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if n_bytes + (1 << 30) > free:
        sys.exit(
            f"{folder} has {free / 2**30:.1f} GiB free; {n_bytes / 2**30 + 1:.1f} are needed: "
            f"free some space or give another --work"
        )


class _Noise:
    """bf16 weights, fast: windows of one tile of normal values, each tensor from its own place."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        values = 0.02 * self._rng.standard_normal(_TILE_VALUES, dtype=np.float32)
        self._tile = _bf16(values)

    def write(self, file: BinaryIO, name: str, n: int) -> None:
        if name.endswith("norm.weight"):
            values = 1 + 0.1 * self._rng.standard_normal(n, dtype=np.float32)
            file.write(_bf16(values).tobytes())
            return
        start = int(self._rng.integers(_TILE_VALUES))
        while n:
            part = self._tile[start : start + n]
            file.write(part.view(np.uint8).data)
            n -= len(part)
            start = 0


def _bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    bits = values.view(np.uint32)
    rounded: npt.NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def _write_shards(folder: Path, tensors: dict[str, tuple[int, ...]], noise: _Noise | None) -> None:
    shards = list(_shards(tensors))
    weight_map = {}
    for i, names in enumerate(shards, 1):
        path = folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in names:
            size = 2 * prod(tensors[name])
            shape, offsets = list(tensors[name]), [at, at + size]
            entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
            weight_map[name] = path.name
            at += size
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        with path.open("wb", buffering=0) as file:
            file.write(len(header).to_bytes(8, "little") + header)
            if noise is None:
                file.truncate(8 + len(header) + at)
            else:
                for name in names:
                    noise.write(file, name, prod(tensors[name]))
    total = 2 * sum(map(prod, tensors.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards(tensors: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in tensors.items():
        if names and size + 2 * prod(shape) > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += 2 * prod(shape)
    yield names
