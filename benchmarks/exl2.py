"""`dsq convert --to exl2` at 4.0 bits a weight beside our own 4-bit GPTQ: time and divergence.

Both see the same calibration tokens, in one run; the heads of both stay as they are, so that only
the layers differ. Divergence is measured as in `benchmarks.gptq`.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.compensated import TINY_CODER, _calibration_text
from benchmarks.gptq import GROUP, N_CTX, OURS, QUICK_TOKENS, TOKENS, kld
from benchmarks.measure import run, settle
from benchmarks.models import smollm2
from benchmarks.results import Goal, Section, spread, table
from benchmarks.settings import Settings, dsq, remove, say

BPW = 4.0
TIME_GOAL, KLD_GOAL = Goal(6), Goal(1.0)


def benchmark(settings: Settings) -> Section:
    source = TINY_CODER if settings.quick else smollm2(settings.work)
    texts = _calibration_text(settings.work)
    n_tokens = QUICK_TOKENS if settings.quick else TOKENS
    size = ["--tokens", str(n_tokens), "--ctx", str(N_CTX), "-t", str(settings.threads)]
    options = {
        "exl2": ["--bpw", str(BPW), "--head-bits", "16"],
        "gptq": [*map(str, OURS), "--bits", "4"],
    }
    outs = {to: settings.work / f"exl2-{to}" for to in options}
    found: dict[str, list[dict[str, Any]]] = {to: [] for to in options}
    for _ in range(settings.repeat):
        for to, how in options.items():
            shutil.rmtree(outs[to], ignore_errors=True)
            settle()
            command = dsq("convert", source, "--to", to, "-o", outs[to], "--json", *how, *size)
            done = run([*command, "--text", *texts])
            found[to].append(json.loads(done.output[done.output.index("{") :]))
            say(f"exl2: {to} {found[to][-1]['seconds']:.1f} s")
    seconds = {to: [report["seconds"] for report in reports] for to, reports in found.items()}
    measuring = [report["measure_seconds"] for report in found["exl2"]]
    ratio = median(seconds["exl2"]) / median(seconds["gptq"])
    both = [spread(seconds[to], 1) for to in ("exl2", "gptq")]
    rows = [
        ["seconds", *both, f"**{ratio:.2f}** ({TIME_GOAL.verdict(ratio)})"],
        ["of them measuring", spread(measuring, 1), "", ""],
        ["bits a weight of the layers", *(f"{_layers(out):.3f}" for out in outs.values()), ""],
        ["bytes", *(f"{found[to][0]['size_bytes']:,}" for to in ("exl2", "gptq")), ""],
    ]
    measured = {"code": settings.text}
    if os.environ.get("DSQ_BENCH_WIKITEXT"):
        measured["wikitext"] = Path(os.environ["DSQ_BENCH_WIKITEXT"])
    for what, text in measured.items():
        ours, other = (kld(source, outs[to], text, settings.chunks) for to in ("exl2", "gptq"))
        verdict = f"**{ours / other:.2f}** ({KLD_GOAL.verdict(ours / other)})"
        rows.append([f"KLD, {what}", f"{ours:.5f}", f"{other:.5f}", verdict])
    for out in outs.values():
        shutil.rmtree(out)
    remove(texts)
    body = (
        f"{source.name}, {n_tokens:,} tokens of calibration, {settings.threads} threads; GPTQ: 4 "
        f"bits, {' '.join(map(str, OURS))}. Loading left out of the times. Groups of {GROUP} "
        "because 128 does not divide SmolLM2's 576 inputs; EXL2's have any of 32, 64, 128.\n\n"
        + table(["", f"EXL2 {BPW}", "GPTQ", "ratio"], rows)
    )
    return Section("exl2", "EXL2 (--to exl2)", body)


def _layers(folder: Path) -> float:
    """Bits a weight of the packed matrices, scales, zero points and g_idx included."""
    from dsq.convert.checkpoint import HfCheckpoint, open_checkpoint

    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, HfCheckpoint)
    assert checkpoint.packed is not None
    names = checkpoint.packed.tensors
    n_bytes = sum(checkpoint.packed.stored_bytes(name) for name in names)
    return 8 * n_bytes / sum(info.n_elements for info in names.values())
