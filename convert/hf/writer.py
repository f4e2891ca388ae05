"""GGUF, GPTQ or EXL2 → Hugging Face: safetensors shards, config.json and so on, tokenizer.

`config.json` is written here, never through `save_pretrained`, which in transformers 5 keeps the
RoPE factor under a key that exllamav2 does not read.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dsq.convert.atomic import (
    atomic_directory,
    check_directory,
    check_space,
    start_writeback,
)
from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
from dsq.convert.gguf.writer import write_all
from dsq.convert.hf.shards import INDEX, SHARD_BYTES, OutTensor, cut, header, index
from dsq.convert.names import ROPE_FREQS, gguf_name, hf_name, permuted_heads
from dsq.convert.pipeline import Artifact, source_files
from dsq.convert.spec import ARCHITECTURE, ModelSpec
from dsq.convert.tensor_plan import TensorStep, half_split_rows
from dsq.errors import InputError
from dsq.quant.plan import tensor_order
from dsq.quant.scheme import BY_NAME, F32, FLOAT_TYPES, GgmlType
from dsq.quant.stream import Dither, Job, quantize_stream
from dsq.quant.threads import default_threads
from dsq.tokenizer_port.to_hf import hf_files
from dsq.tokenizer_port.vocabulary import Vocabulary

_FILES = {
    "config.json",
    "generation_config.json",
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
}
_DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_TORCH_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def is_model_file(name: str) -> bool:
    """What `write_hf` writes: all that `--force` may replace."""
    return name in _FILES or re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", name) is not None


def plan_to_hf(
    checkpoint: GgufCheckpoint | HfCheckpoint, outtype: str = "auto"
) -> tuple[TensorStep, ...]:
    """Every tensor under its HF name. `auto` keeps float types and holds quantized ones in f32,
    the only type that holds dequantized values exactly; vectors follow the matrices."""
    to = _outtype(checkpoint, outtype)
    if isinstance(checkpoint, HfCheckpoint):
        ordered = sorted(checkpoint.tensors.values(), key=lambda t: tensor_order(gguf_name(t.name)))
        return tuple(TensorStep(info.name, info.shape, to, info) for info in ordered)
    return tuple(
        TensorStep(
            hf_name(info.name), info.shape, to, info, permuted_heads(info.name, checkpoint.spec)
        )
        for info in sorted(checkpoint.tensors.values(), key=lambda t: tensor_order(t.name))
        if info.name != ROPE_FREQS  # config.json says it
    )


def _outtype(checkpoint: GgufCheckpoint | HfCheckpoint, outtype: str) -> GgmlType:
    if outtype != "auto":
        if outtype not in _DTYPES:
            raise InputError(f"--outtype {outtype} for --to hf; choose auto, f32, f16 or bf16")
        return BY_NAME[outtype]
    kinds = {t.type for t in checkpoint.tensors.values() if len(t.shape) > 1}
    return kinds.pop() if len(kinds) == 1 and kinds <= set(FLOAT_TYPES) else F32


def write_hf(
    checkpoint: GgufCheckpoint | HfCheckpoint,
    steps: Sequence[TensorStep],
    out: Path,
    *,
    force: bool = False,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    dither: Dither | None = None,
    pre: str | None = None,
    progress: Callable[[int], None] = lambda n: None,
    jobs: Iterator[Job] | None = None,
) -> Artifact:
    """Write the directory; it appears under its name only when complete.

    `jobs`: the steps' tensors, where they are not read from the files as they lie there.
    """
    start = time.perf_counter()
    n_bytes = sum(s.n_bytes for s in steps)
    out = out.resolve()
    if any(out in file.resolve().parents for file in source_files(checkpoint)):
        raise InputError(f"{out} holds the source itself; give another output")
    check_directory(out, force=force, ours=is_model_file)
    check_space(out, n_bytes)
    vocab = checkpoint.vocabulary(pre=pre)
    tensors = [OutTensor(s.name, _DTYPES[s.to.name], s.shape) for s in steps]
    shards = cut(tensors, SHARD_BYTES)
    slabs = quantize_stream(
        _jobs(checkpoint, steps, dither) if jobs is None else jobs,
        threads=threads or default_threads(),
        allow_nonfinite=allow_nonfinite,
    )
    with atomic_directory(out, force=force, ours=is_model_file) as folder:
        for name, members in shards.items():
            with (folder / name).open("wb", buffering=0) as file:
                write_all(file, header(members)[0])
                for tensor in members:
                    for slab in slabs:
                        assert slab.job.name == tensor.name
                        write_all(file, slab.bytes)
                        start_writeback(file.fileno())
                        progress(slab.data.nbytes)
                        if slab.last:
                            break
        contents = {
            **index(shards),
            "config.json": config_json(checkpoint.spec, vocab, steps[0].to),
            "generation_config.json": generation_config_json(vocab),
            **hf_files(vocab, checkpoint.spec.n_ctx),
        }
        for name, content in contents.items():
            _write_json(folder / name, content)
    files = tuple(sorted(out.iterdir()))
    return Artifact(files, sum(f.stat().st_size for f in files), time.perf_counter() - start)


def _jobs(
    checkpoint: GgufCheckpoint | HfCheckpoint, steps: Sequence[TensorStep], dither: Dither | None
) -> Iterator[Job]:
    for step in steps:
        assert step.source is not None
        n_per_row = 1 if step.heads and len(step.shape) == 1 else step.source.n_per_row
        raw = checkpoint.data(step.source.name).reshape(-1, step.stored.row_bytes(n_per_row))
        order = half_split_rows(len(raw), step.heads) if step.heads else None
        yield Job(step.name, raw, step.stored, step.to, n_per_row, order, noise=dither)


def config_json(spec: ModelSpec, vocab: Vocabulary, to: GgmlType) -> dict[str, Any]:
    """A config.json in which every reader finds the RoPE factor (see `Rope.to_config`)."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "attention_bias": spec.attention_bias,
        "mlp_bias": spec.mlp_bias,
        "bos_token_id": vocab.bos,
        "eos_token_id": vocab.eos,
        "pad_token_id": vocab.pad,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "hidden_size": spec.n_embd,
        "intermediate_size": spec.n_ff,
        "max_position_embeddings": spec.n_ctx,
        "num_attention_heads": spec.n_head,
        "num_hidden_layers": spec.n_layer,
        "num_key_value_heads": spec.n_head_kv,
        "rms_norm_eps": spec.rms_eps,
        **spec.rope.to_config(),
        "tie_word_embeddings": spec.tied,
        "torch_dtype": _TORCH_DTYPES[to.name],
        "vocab_size": spec.n_vocab,
    }


def generation_config_json(vocab: Vocabulary) -> dict[str, Any]:
    ids = {"bos_token_id": vocab.bos, "eos_token_id": vocab.eos, "pad_token_id": vocab.pad}
    return {key: value for key, value in ids.items() if value is not None}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
