"""`dsq convert --to gptq` beside GPTQModel: time, and divergence from the source, in one run.

Both see the same calibration tokens (those of one statistics file) and write the same layout; the
divergence of both is that of their dequantized weights in transformers (float32), on text that
neither saw. GPTQModel's settings are its
defaults but for act-order, which turns its `act_group_aware` off.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.compensated import TINY_CODER, _calibration_text
from benchmarks.measure import run, settle
from benchmarks.models import smollm2
from benchmarks.results import Goal, Section, table
from benchmarks.settings import Settings, dsq, remove, say

TOKENS, QUICK_TOKENS, N_CTX, GROUP = 16_384, 2_048, 512, 64
KLD_GOALS = {4: Goal(1.0), 3: Goal(0.9)}
TIME_GOAL = Goal(0.5)
THEIRS = {"group_size": GROUP, "sym": True, "desc_act": True, "act_group_aware": False}
OURS = ["--group-size", GROUP, "--act-order", "--static-groups"]


def benchmark(settings: Settings) -> Section:
    source = TINY_CODER if settings.quick else smollm2(settings.work)
    texts = _calibration_text(settings.work)
    stats, threads = settings.work / "gptq.stats", str(settings.threads)
    n_tokens = QUICK_TOKENS if settings.quick else TOKENS
    size = ["--tokens", str(n_tokens), "-c", str(N_CTX), "-t", threads]
    run(dsq("calibrate", source, "-o", stats, "--force", *size, "--text", *texts))
    measured = {"code": settings.text}
    if os.environ.get("DSQ_BENCH_WIKITEXT"):
        measured["wikitext"] = Path(os.environ["DSQ_BENCH_WIKITEXT"])
    rows = []
    their_cpu = {}
    for bits, goal in KLD_GOALS.items():
        ours, theirs = (settings.work / f"gptq-{side}-{bits}" for side in ("ours", "theirs"))
        script = [sys.executable, "-m", "benchmarks.gptq", source, theirs, stats, str(bits)]
        settle()
        they = json.loads(run([*script, threads]).output.splitlines()[-1])
        their_seconds, their_cpu[bits] = they["seconds"], they["cpu_seconds"]
        settle()
        options = [*map(str, OURS), "--bits", str(bits), "--stats", stats, "-t", threads]
        done = run(
            dsq("convert", source, "--to", "gptq", "-o", ours, "--force", "--json", *options)
        )
        our_seconds = json.loads(done.output[done.output.index("{") :])["seconds"]
        ratio = our_seconds / their_seconds
        for what, text in measured.items():
            mine, other = (kld(source, d, text, settings.chunks) for d in (ours, theirs))
            say(f"gptq {bits} bits, {what}: {mine / other:.3f}")
            rows.append(
                [
                    f"{bits} bits, {what}",
                    f"{mine:.5f}",
                    f"{other:.5f}",
                    f"**{mine / other:.2f}** ({goal.verdict(mine / other)})",
                    f"{our_seconds:.1f}",
                    f"{their_seconds:.1f}",
                    f"{ratio:.2f} ({TIME_GOAL.verdict(ratio)})",
                ]
            )
    compensated = _compensated(settings, source, stats, their_cpu[4])
    remove([stats, *texts])
    header = ["", "KLD", "GPTQModel", "ratio", "seconds", "GPTQModel", "ratio"]
    body = (
        f"{source.name}, {n_tokens:,} tokens of calibration, {threads} threads. dsq: "
        f"{' '.join(map(str, OURS))}; GPTQModel 7.6.0: {THEIRS}, GPTQMODEL_CPU_WORKERS=2. "
        f"Loading left out of both times.\n\n{table(header, rows)}\n\n{compensated}"
    )
    return Section("gptq", "GPTQ (--to gptq)", body)


def _compensated(settings: Settings, source: Path, stats: Path, their_cpu: float) -> str:
    """GGUF's error feedback on the same tokens; all of our process counts, of theirs no loading."""
    out, threads = settings.work / "gptq-compensated.gguf", str(settings.threads)
    options = ["--method", "compensated", "--stats", stats, "-t", threads]
    settle()
    used = run(dsq("quantize", "q4_0", source, "-o", out, "--force", *options))
    remove([out])
    ratio = used.cpu_seconds / their_cpu
    return (
        f"`dsq quantize q4_0 --method compensated` on the same tokens takes "
        f"{used.cpu_seconds:.0f} s of processor time, GPTQModel's 4 bits {their_cpu:.0f} s: "
        f"**{ratio:.2f}** ({Goal(0.5).verdict(ratio)})."
    )


def kld(source: Path, quantized: Path, text: Path, n_windows: int) -> float:
    """Mean KLD of all positions of windows of N_CTX tokens, drawn from the text."""
    import torch
    from transformers import LlamaForCausalLM

    from dsq.convert.checkpoint import open_checkpoint
    from dsq.runtime.calibration.calibrate import Options, choose_windows
    from dsq.runtime.decoder import read_tensor

    checkpoint = open_checkpoint(quantized)
    options = Options(N_CTX, n_windows * N_CTX)
    ids = choose_windows(open_checkpoint(source), [text.read_text()], options)
    models = [LlamaForCausalLM.from_pretrained(source, dtype=torch.float32) for _ in range(2)]
    with torch.inference_mode():
        for name, values in models[1].named_parameters():
            values.copy_(read_tensor(checkpoint, name))
        total = 0.0
        for row in torch.from_numpy(ids.astype("int64")):
            p, q = (model(row[None]).logits.log_softmax(-1) for model in models)
            total += float((p.exp() * (p - q)).sum(-1).mean())
    return total / len(ids)


def theirs(source: str, out: str, stats: str, bits: str, threads: str) -> dict[str, Any]:
    """Quantize with GPTQModel, in a process of its own."""
    os.environ.update(GPTQMODEL_CPU_WORKERS="2", CUDA_VISIBLE_DEVICES="")
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    from dsq.quant.stats import read_stats

    torch.set_num_threads(int(threads))
    model = GPTQModel.load(source, QuantizeConfig(bits=int(bits), **THEIRS), device="cpu")
    ids = torch.from_numpy(read_stats(stats).tokens.astype("int64"))
    data = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]
    start, cpu = time.perf_counter(), time.process_time()
    model.quantize(data, batch_size=1)
    model.save(out)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
    }


if __name__ == "__main__":
    print("\n" + json.dumps(theirs(*sys.argv[1:])))
