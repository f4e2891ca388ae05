"""GPTQ → GGUF of a 6.7b-shaped checkpoint: time beside a plain copy of it, and memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import median
from typing import BinaryIO

import numpy as np

from benchmarks.measure import fsync_seconds, run, settle, warm
from benchmarks.models import SHAPES, Shape, need, size_bytes, smollm2, weight_files
from benchmarks.results import Goal, Section, spread, table
from benchmarks.settings import Settings, dsq, remove, say
from dsq.convert.hf.shards import SHARD_BYTES, OutTensor, cut, header, index
from dsq.convert.names import expected_tensors
from dsq.convert.spec import spec_from_config
from dsq.quant.gptq_layout import part_shapes

GROUP, BITS = 128, 4
TIME_GOAL = Goal(1.3)
MEMORY_BYTES = 1 << 30
_TILE_WORDS = (1 << 22) + 1031  # of random codes; not a multiple of any row

_HOW = """\
The checkpoint has random codes in the shape of DeepSeek Coder 6.7b (49,152 rows of vocabulary),
4 bits, groups of 128, symmetric: every matrix becomes q4_0, bit for bit. dsq's time is the whole
command, which reads, re-arranges the codes, writes and ends with `fsync`. The copy is `cp` of the
checkpoint's files to the same disk, then `fsync`. Both in turn; the files are read once before
(what memory holds of them is in the page cache for both). Memory is of one more run, sampled every
20 ms: anonymous is what the program holds for itself, mapped pages are the checkpoint's own."""


def benchmark(settings: Settings) -> Section:
    shape = SHAPES["small" if settings.quick else "6.7b"]
    source = gptq_checkpoint(settings.work, shape)
    need(settings.work, 2 * size_bytes(source))
    out = settings.work / "repacked.gguf"
    command = dsq("convert", source, "-o", out, "--exact", "--json", "-t", str(settings.threads))
    ours, copies = [], []
    try:
        for _ in range(settings.repeat):
            _quiet(source, out)
            copies.append(_copy_seconds(source))
            _quiet(source, out)
            ours.append(run(command))
            say(f"repack: {ours[-1].seconds:.2f} s, copy {copies[-1]:.2f} s")
        _quiet(source, out)
        sampled = run(command, sample=True)
        receipt = json.loads(sampled.output[sampled.output.index("{") :])["receipt"]
        written = out.stat().st_size
    finally:
        remove([out])
    seconds = [usage.seconds for usage in ours]
    ratio = median(seconds) / median(copies)
    anonymous = sampled.anonymous or 0
    met = "met" if anonymous <= MEMORY_BYTES else "**missed**"
    rows = [
        ["dsq convert, s", spread(seconds), f"{written / 1e6 / median(seconds):.0f} MB/s written"],
        ["its processor time, s", spread([usage.cpu_seconds for usage in ours]), ""],
        ["plain copy, s", spread(copies), f"{size_bytes(source) / 1e6 / median(copies):.0f} MB/s"],
        ["ratio", f"**{ratio:.2f}**", TIME_GOAL.verdict(ratio)],
        ["anonymous memory", f"{anonymous / 2**20:.0f} MiB", f"≤ 1 GiB: {met}"],
        ["mapped", f"{(sampled.mapped or 0) / 2**20:.0f} MiB", ""],
        ["lossless", "yes" if receipt["exact"] else "**no**", f"{receipt['types']}"],
    ]
    sizes = f"{size_bytes(source) / 1e9:.2f} GB → {written / 1e9:.2f} GB"
    return Section("repack", "GPTQ → GGUF", f"{_HOW}\n\n{table([sizes, '', ''], rows)}")


def gptq_checkpoint(folder: Path, shape: Shape) -> Path:
    """A sharded GPTQ directory of `shape` with random codes and SmolLM2's tokenizer."""
    out = folder / f"{shape.name}-gptq"
    if out.exists():
        return out
    like = smollm2(folder)
    config = shape.config(json.loads((like / "config.json").read_text()))
    config |= {"torch_dtype": "float16"}
    tensors: list[OutTensor] = []
    for name, dims in expected_tensors(spec_from_config(config)).items():
        if not name.endswith("_proj.weight"):
            tensors.append(OutTensor(name, "F16", dims))
            continue
        n_out, n_in = dims
        for part, size in part_shapes(n_in, n_out, -(-n_in // GROUP), BITS).items():
            dtype = "F16" if part == "scales" else "I32"
            tensors.append(OutTensor(f"{name.removesuffix('weight')}{part}", dtype, size))
    need(folder, sum(tensor.n_bytes for tensor in tensors))
    said = {"bits": BITS, "group_size": GROUP, "sym": True, "desc_act": False}
    building = out.with_name(out.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(like / name, building)
    shards = cut(tensors, SHARD_BYTES)
    made = index(shards) | {
        "config.json": {**config, "quantization_config": {"quant_method": "gptq", **said}}
    }
    for name, content in made.items():
        (building / name).write_text(json.dumps(content))
    fill = _Filler()
    for name, members in shards.items():
        with (building / name).open("wb", buffering=0) as file:
            file.write(header(members)[0])
            for tensor in members:
                fill.write(file, tensor)
    building.rename(out)
    return out


class _Filler:
    """Windows of one tile of random words, each tensor's from its own place."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.words = self.rng.integers(-(2**31), 2**31, _TILE_WORDS, dtype=np.int32)
        self.floats = (0.002 + 0.001 * self.rng.random(_TILE_WORDS)).astype(np.float16)

    def write(self, file: BinaryIO, tensor: OutTensor) -> None:
        part, n = tensor.name.rpartition(".")[2], tensor.n_bytes
        if part == "g_idx":
            file.write((np.arange(n // 4, dtype=np.int32) // GROUP).tobytes())
        elif part == "qzeros":
            file.write(np.full(n // 4, 0x77777777, np.int32).tobytes())  # 8, one less
        else:
            tile = (self.words if part == "qweight" else self.floats).view(np.uint8)
            at = 4 * int(self.rng.integers(_TILE_WORDS))
            while n:
                window = tile[at : at + n]
                file.write(window.data)
                n, at = n - len(window), 0


def _quiet(source: Path, out: Path) -> None:
    remove([out])
    settle()
    warm(weight_files(source))


def _copy_seconds(source: Path) -> float:
    target = source.with_name(source.name + ".copy")
    target.mkdir()
    try:
        copied = run(["cp", "--reflink=never", *weight_files(source), target])
        return copied.seconds + sum(fsync_seconds(path) for path in target.iterdir())
    finally:
        shutil.rmtree(target)
