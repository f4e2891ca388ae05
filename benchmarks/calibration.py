"""`dsq calibrate`: its speed beside a plain forward of transformers, and its peak memory."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from statistics import median

from benchmarks.measure import run, settle, warm
from benchmarks.models import SHAPES, Shape, random_checkpoint, size_bytes, smollm2, weight_files
from benchmarks.peers import ROOT
from benchmarks.results import Goal, Section, spread, table
from benchmarks.settings import Settings, dsq, remove, say

N_CTX = 512
TOKENS = 32_768
QUICK_TOKENS = 4_096
FLAGS = {
    "importance matrix": (),
    "with Hessians": ("--hessians",),
    "with Hessians and gradients": ("--hessians", "--gradients"),
}
GOALS = {"importance matrix": 0.8, "with Hessians": 0.45}

# The peak is one layer's, so a few layers show it. As many KV heads as heads: the 33b has 8 of 56,
# and so smaller layers than these.
FEW_LAYERS = (
    Shape("6.7b-2-layers", n_embd=4096, n_ff=11008, n_layer=2, n_head=32),
    Shape("6.7b-4-layers", n_embd=4096, n_ff=11008, n_layer=4, n_head=32),
    Shape("33b-1-layer", n_embd=7168, n_ff=19200, n_layer=1, n_head=56),
)
MEMORY_TOKENS = 4_096


def benchmark(settings: Settings) -> Section:
    body = f"{_speed(settings)}\n\n{_memory(settings)}"
    return Section("calibration", "Calibration", body)


def _speed(settings: Settings) -> str:
    source = smollm2(settings.work)
    text = ROOT / "models" / "tiny-coder" / "heldout.txt"
    n_tokens = QUICK_TOKENS if settings.quick else TOKENS
    numbers = [str(n) for n in (N_CTX, n_tokens, settings.threads)]
    plain: list[float] = []
    ours: dict[str, list[float]] = {name: [] for name in FLAGS}
    for _ in range(settings.repeat):
        warm(weight_files(source))
        settle()
        script = [sys.executable, "-m", "benchmarks.plain_forward", source, text, *numbers]
        plain.append(json.loads(run(script).output.splitlines()[-1])["tokens_per_second"])
        say(f"calibration plain forward: {plain[-1]:.0f} tokens/s")
        for name, flags in FLAGS.items():
            settle()
            report = _calibrate(settings, source, text, n_tokens, N_CTX, flags)
            ours[name].append(report["tokens_per_second"])
            say(f"calibration {name}: {ours[name][-1]:.0f} tokens/s")
    rows = []
    for name, speeds in ours.items():
        ratio = median(speeds) / median(plain)
        goal = Goal(GOALS[name], at_least=True).verdict(ratio) if name in GOALS else ""
        rows.append([name, spread(speeds, 0), spread(plain, 0), f"**{ratio:.2f}**", goal])
    return (
        f"SmolLM2-135M-Instruct on `{text.name}`: {n_tokens:,} tokens in windows of {N_CTX}, "
        f"{settings.threads} threads, the sides in turn. The peer is transformers' forward pass of "
        "the same windows in float32, logits included, loading and tokenizing left out; dsq's "
        "figure includes reading the weights, and leaves out tokenizing. dsq computes no logits "
        "unless gradients are asked for, which are of at most 16,384 tokens.\n\n"
        + table(["", "dsq, tokens/s", "peer, tokens/s", "ratio", "goal"], rows)
    )


def _memory(settings: Settings) -> str:
    shapes = (SHAPES["tiny"], SHAPES["small"]) if settings.quick else FEW_LAYERS
    rows = []
    for shape in shapes:
        source = random_checkpoint(settings.work, shape)
        for flags in ((), ("--hessians",)):
            rows.append(_peak(settings, shape, source, flags))
        if not settings.quick:
            shutil.rmtree(source)  # several GB
    header = ["model", "", "checkpoint", "anonymous", "its own report", "statistics", "goal"]
    return (
        "Peak memory, random weights in the shapes of DeepSeek Coder, "
        f"{MEMORY_TOKENS:,} tokens: one layer is in memory at a time, so the number of layers does "
        "not matter, and the 33b takes what its one layer takes. Anonymous memory as in “Memory "
        "and bytes written”; hidden states and the checkpoint are files, which the kernel keeps as "
        "far as it has room.\n\n" + table(header, rows)
    )


def _peak(settings: Settings, shape: Shape, source: Path, flags: tuple[str, ...]) -> list[str]:
    text = ROOT / "models" / "tiny-coder" / "heldout.txt"
    out = settings.work / "stats.safetensors"
    try:
        used = run(_command(settings, source, text, MEMORY_TOKENS, 2048, flags, out), sample=True)
    finally:
        remove([out])
    report = json.loads(used.output[used.output.index("{") :])
    anonymous = used.anonymous or 0
    say(f"calibration {shape.name} {' '.join(flags)}: {anonymous / 2**30:.2f} GiB")
    return [
        shape.name,
        " ".join(flags) or "importance matrix",
        *(f"{n / 2**30:.2f} GiB" for n in (size_bytes(source), anonymous, report["peak_bytes"])),
        f"{report['size_bytes'] / 2**30:.2f} GiB",
        f"≤ 24 GiB: {'met' if anonymous <= 24 << 30 else '**missed**'}",
    ]


def _calibrate(
    settings: Settings,
    source: Path,
    text: Path,
    n_tokens: int,
    n_ctx: int,
    flags: tuple[str, ...],
) -> dict[str, float]:
    out = settings.work / "stats.safetensors"
    try:
        used = run(_command(settings, source, text, n_tokens, n_ctx, flags, out))
    finally:
        remove([out])
    report: dict[str, float] = json.loads(used.output[used.output.index("{") :])
    return report


def _command(
    settings: Settings,
    source: Path,
    text: Path,
    n_tokens: int,
    n_ctx: int,
    flags: tuple[str, ...],
    out: Path,
) -> list[str | Path]:
    numbers = ["--tokens", str(n_tokens), "-c", str(n_ctx), "-t", str(settings.threads)]
    options = [*numbers, *flags, "-o", out, "--force", "--json"]
    return dsq("calibrate", source, "--text", text, *options)
