"""A step of `--distill` beside a plain forward of transformers over as many tokens."""

from __future__ import annotations

import json
import sys
from statistics import median

from benchmarks.compensated import TINY_CODER, _calibration_text
from benchmarks.measure import run, settle, warm
from benchmarks.models import smollm2, weight_files
from benchmarks.results import Goal, Section, spread, table
from benchmarks.settings import Settings, dsq, remove, say

N_CTX, BATCH_TOKENS = 512, 512  # as in runtime/fidelity/distill.py's Options
TOKENS, QUICK_TOKENS = 16_384, 4_096
GOAL = Goal(3.5)


def benchmark(settings: Settings) -> Section:
    source = TINY_CODER if settings.quick else smollm2(settings.work)
    texts, out = _calibration_text(settings.work), settings.work / "distilled.gguf"
    n_tokens = str(QUICK_TOKENS if settings.quick else TOKENS)
    threads = str(settings.threads)
    script = [sys.executable, "-m", "benchmarks.plain_forward", source, texts[0]]
    options = ["--distill", n_tokens, "-t", threads, "--calibrate", "--tokens", n_tokens]
    options += ["-c", str(N_CTX), "-o", out, "--force", "--json", "--text", *texts]
    steps: list[float] = []
    forwards: list[float] = []
    kept = set()
    for _ in range(settings.repeat):
        warm(weight_files(source))
        settle()
        done = run([*script, str(N_CTX), n_tokens, threads, str(BATCH_TOKENS)])
        speed = json.loads(done.output.splitlines()[-1])["tokens_per_second"]
        forwards.append(BATCH_TOKENS / speed)
        settle()
        done = run(dsq("quantize", "q4_0", source, *options))
        report = json.loads(done.output[done.output.index("{") :])["distillation"]
        steps.append(report["seconds_per_step"])
        kept.add("kept" if report["layers_kept"] else "computed twice")
        say(f"distillation: {steps[-1]:.2f} s a step, {forwards[-1]:.2f} s a forward")
    remove([out, *texts])
    ratio = median(steps) / median(forwards)
    rows = [
        [
            f"{source.name}, q4_0",
            spread(steps),
            spread(forwards),
            f"**{ratio:.2f}**",
            GOAL.verdict(ratio),
        ]
    ]
    body = (
        f"Seconds for {BATCH_TOKENS} tokens in windows of {N_CTX}, {threads} threads, the sides in "
        f"turn; activations are {' or '.join(sorted(kept))}. The peer is transformers' forward "
        "pass in float32, logits included. A step is forward, backward and Adam; the looks at the "
        "held-out windows, one in 16 steps, and the original's one pass are left out.\n\n"
        + table(["", "a step", "a forward", "ratio", "goal"], rows)
    )
    return Section("distillation", "Distillation (--distill)", body)
