"""GPTQ and EXL2 directories → dense Hugging Face directories."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsq.convert.atomic import atomic_directory, check_directory, check_space, start_writeback
from dsq.convert.checkpoint import HfCheckpoint
from dsq.convert.gguf.writer import write_all
from dsq.convert.hf import writer
from dsq.convert.names import gguf_name
from dsq.convert.pipeline import Artifact, Progress, source_files
from dsq.convert.repack import Choice, packed_jobs, receipt
from dsq.convert.repack_jobs import Difference, Recipe
from dsq.convert.tensor_plan import TensorStep
from dsq.errors import InputError
from dsq.quant.plan import tensor_order
from dsq.quant.scheme import BY_NAME, F32
from dsq.quant.stream import quantize_stream
from dsq.quant.threads import default_threads
from dsq.tokenizer_port.to_hf import hf_files


def plan_unpack(
    checkpoint: HfCheckpoint, outtype: str = "auto", *, exact: bool = False
) -> tuple[TensorStep, ...]:
    """Every tensor, dense. `auto` is f32, which alone holds code · scale exactly; `exact` refuses
    another type."""
    if checkpoint.packed is None:
        raise InputError(f"{checkpoint.path}: is neither GPTQ nor EXL2; nothing to unpack")
    if outtype not in ("auto", "f32", "f16", "bf16"):
        raise InputError(f"--outtype {outtype} for --to hf; choose auto, f32, f16 or bf16")
    to = F32 if outtype == "auto" else BY_NAME[outtype]
    if exact and to is not F32:
        raise InputError(
            f"--outtype {outtype}: rounds the weights; leave out --exact, or take --outtype f32"
        )
    infos = sorted(checkpoint.tensors.values(), key=lambda info: tensor_order(gguf_name(info.name)))
    return tuple(TensorStep(info.name, info.shape, to, info) for info in infos)


def run_unpack(
    checkpoint: HfCheckpoint,
    steps: Sequence[TensorStep],
    out: Path,
    *,
    force: bool = False,
    threads: int | None = None,
    pre: str | None = None,
    progress: Progress = lambda n: None,
) -> tuple[Artifact, dict[str, Any]]:
    """Write the directory, which appears when it is complete. Returns it and the receipt: see
    `repack.receipt`."""
    start = time.perf_counter()
    packed = checkpoint.packed
    assert packed is not None
    threads = threads or default_threads()
    out = out.resolve()
    if any(out in file.resolve().parents for file in source_files(checkpoint)):
        raise InputError(f"{out} holds the source itself; give another output")
    check_directory(out, force=force, ours=writer.is_model_file)
    check_space(out, sum(step.n_bytes for step in steps))
    choices = {
        step.name: Choice(
            packed.kind(step.name), Recipe.ROUNDED, step.to, 0.0 if step.to is F32 else None
        )
        for step in steps
        if step.name in packed.tensors
    }
    vocab = checkpoint.vocabulary(pre=pre)
    files = {
        "config.json": writer.config_json(checkpoint.spec, vocab, steps[0].to),
        "generation_config.json": writer.generation_config_json(vocab),
        **hf_files(vocab, checkpoint.spec.n_ctx),
    }
    differences: dict[str, Difference] = {}
    slabs = quantize_stream(
        packed_jobs(checkpoint, steps, choices, differences, threads), threads=threads
    )
    shards = writer._shards(steps)
    with atomic_directory(out, force=force, ours=writer.is_model_file) as folder:
        for name, members in shards.items():
            with (folder / name).open("wb", buffering=0) as file:
                write_all(file, writer._header(members))
                for step in members:
                    for slab in slabs:
                        assert slab.job.name == step.name
                        write_all(file, slab.bytes)
                        start_writeback(file.fileno())
                        progress(slab.data.nbytes)
                        if slab.last:
                            break
        if len(shards) > 1:
            files["model.safetensors.index.json"] = {
                "metadata": {"total_size": sum(step.n_bytes for step in steps)},
                "weight_map": {s.name: name for name, group in shards.items() for s in group},
            }
        for name, content in files.items():
            writer._write_json(folder / name, content)
    written = tuple(sorted(out.iterdir()))
    size = sum(file.stat().st_size for file in written)
    artifact = Artifact(written, size, time.perf_counter() - start)
    return artifact, receipt(checkpoint, choices, differences)
