"""`--method compensated` beside plain rounding with an importance matrix: divergence and time.

The plain files equal llama-quantize's (tests/convert/test_byte_identity.py). Both sides see
the same calibration tokens. Half of them are Python source, half English prose: $DSQ_BENCH_PROSE, a
text file, or Python's own manual. $DSQ_BENCH_WIKITEXT, wikitext-2's raw test split, is measured on
when it is named; nothing is calibrated on it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import run, settle
from benchmarks.models import SHAPES, Shape, random_checkpoint, smollm2
from benchmarks.peers import ROOT
from benchmarks.results import Goal, Section, table
from benchmarks.settings import Settings, dsq, remove, say

TINY_CODER = ROOT / "models" / "tiny-coder"
TOKENS, QUICK_TOKENS, N_CTX = 65_536, 2_048, 512
GOALS = {"q4_0": 0.8, "q4_k_m": 0.85, "q3_k_m": 1.0, "q2_k": 0.7}
CASES = [("SmolLM2", "q4_0"), *(("tiny-coder", kind) for kind in GOALS)]
# The sizes of SmolLM2, but for the number of layers: all of them take the same time.
FOUR_LAYERS = Shape("smollm2-4-layers", n_embd=576, n_ff=1536, n_layer=4, n_head=9)
TIME_GOAL = Goal(1.5)


def benchmark(settings: Settings) -> Section:
    texts = _calibration_text(settings.work)
    try:
        body = f"{_fidelity(settings, texts)}\n\n{_time(settings, texts)}"
    finally:
        remove(texts)
    return Section("compensated", "Error feedback (--method compensated)", body)


def _fidelity(settings: Settings, texts: list[Path]) -> str:
    models = {
        "SmolLM2": random_checkpoint(settings.work, SHAPES["tiny"])
        if settings.quick
        else smollm2(settings.work),
        "tiny-coder": TINY_CODER,
    }
    measured = {"code": settings.text}
    if os.environ.get("DSQ_BENCH_WIKITEXT"):
        measured["wikitext"] = Path(os.environ["DSQ_BENCH_WIKITEXT"])
    rows = []
    for name, kind in CASES:
        files = _files(settings, models[name], kind, texts)
        for what, text in measured.items():
            ours, theirs = (_eval(settings, f, models[name], text) for f in files)
            ratio = ours["kld_mean"] / theirs["kld_mean"]
            error = ratio * math.hypot(*(r["kld_stderr"] / r["kld_mean"] for r in (ours, theirs)))
            say(f"compensated {name} {kind} {what}: {ratio:.3f}")
            rows.append(
                [
                    f"{name} {kind}, {what}",
                    *(f"{r['kld_mean']:.5f} ± {r['kld_stderr']:.5f}" for r in (ours, theirs)),
                    f"**{ratio:.2f}** ± {error:.2f}",
                    Goal(GOALS[kind]).verdict(ratio),
                    *(f"{r['ppl']:.3f}" for r in (ours, theirs)),
                    f"{files[0].stat().st_size / files[1].stat().st_size:.4f}",
                ]
            )
        remove(files)
    header = [
        "",
        "KLD",
        "with an imatrix",
        "ratio",
        "goal",
        "PPL",
        "with an imatrix",
        "size, ratio",
    ]
    return (
        f"Mean KLD from the source on `{' and '.join(p.name for p in measured.values())}`, at most "
        f"{settings.chunks} windows of 512; {_n_tokens(settings):,} tokens of calibration "
        f"({', '.join(p.name for p in texts)}). The errors are those of each mean: the two sides "
        f"see the same tokens, so the ratio is better known than they say.\n\n{table(header, rows)}"
    )


def _n_tokens(settings: Settings) -> int:
    return QUICK_TOKENS if settings.quick else TOKENS


def _files(settings: Settings, source: Path, kind: str, texts: list[Path]) -> tuple[Path, Path]:
    stats = settings.work / "compensated.stats"
    ours, theirs = (settings.work / f"{side}-{kind}.gguf" for side in ("ours", "theirs"))
    size = ["--tokens", str(_n_tokens(settings)), "-c", str(N_CTX), "-t", str(settings.threads)]
    run(dsq("calibrate", source, "-o", stats, "--force", *size, "--text", *texts))
    plain = ["--imatrix", stats]
    compensated = ["--method", "compensated", "--stats", stats, "-t", str(settings.threads)]
    for out, options in ((theirs, plain), (ours, compensated)):
        run(dsq("quantize", kind, source, "-o", out, "--force", *options))
    remove([stats])
    return ours, theirs


def _eval(settings: Settings, model: Path, ref: Path, text: Path) -> dict[str, Any]:
    options = ["-c", "512", "--chunks", str(settings.chunks), "-t", str(settings.threads)]
    done = run(dsq("eval", model, "--ref", ref, "--text", text, *options, "--json"))
    report: dict[str, Any] = json.loads(done.output[done.output.index("{") :])
    return report


def _time(settings: Settings, texts: list[Path]) -> str:
    source = random_checkpoint(settings.work, SHAPES["tiny"] if settings.quick else FOUR_LAYERS)
    n_tokens = str(_n_tokens(settings))
    out, threads = settings.work / "timed.gguf", str(settings.threads)
    script = [sys.executable, "-m", "benchmarks.compensated_parts", source, *texts]
    options = ["--method", "compensated", "--calibrate", "--tokens", n_tokens, "-t", threads]
    command = dsq("quantize", "q4_0", source, "-o", out, "--force", *options, "--json", "--text")
    seconds, parts = [], []
    for _ in range(settings.repeat):
        settle()
        parts.append(json.loads(run([*script, n_tokens, threads]).output.splitlines()[-1]))
        settle()
        seconds.append(json.loads(run([*command, *texts]).output)["compensation"]["seconds"])
        say(f"compensated: {seconds[-1]:.1f} s, parts {sum(parts[-1].values()):.1f} s")
    remove([out])
    best = min(parts, key=lambda p: sum(p.values()))
    needed = sum(best.values())
    ratio = min(seconds) / needed
    rows = [
        [
            f"dsq quantize q4_0 --method compensated, {FOUR_LAYERS.n_layer} layers",
            f"{min(seconds):.1f}",
        ]
    ]
    rows += [[name, f"{value:.1f}"] for name, value in best.items()]
    rows += [["ratio to the sum of the parts", f"**{ratio:.2f}** ({TIME_GOAL.verdict(ratio)})"]]
    return (
        f"Time, for {int(n_tokens):,} tokens and {FOUR_LAYERS.n_layer} random layers of SmolLM2's "
        "sizes (as many KV heads as heads), against the parts that it needs: the bare forward "
        "passes of both ways, the matrix products of Hessians and aims, and the factorizations.\n\n"
        + table(["", "seconds"], rows)
    )


def _calibration_text(folder: Path) -> list[Path]:
    """Source of the standard library, without what is measured on, and as much prose."""
    code, prose = folder / "calibration-code.txt", folder / "calibration-prose.txt"
    code.write_text("\n\n\n".join(_sources()))
    named = os.environ.get("DSQ_BENCH_PROSE")
    if named:
        text = Path(named).read_text()
    else:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[key] for key in sorted(topics))
    prose.write_text(text[: code.stat().st_size])
    return [code, prose]


def _sources(size: int = 500_000) -> Iterator[str]:
    """Beginnings of files, in the order of their hash."""
    held_out = set(
        re.findall(r"^# CPython Lib/(\S+)$", (TINY_CODER / "heldout.txt").read_text(), re.M)
    )
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(
        (p for p in root.rglob("*.py") if "site-packages" not in p.parts),
        key=lambda p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest(),
    )
    for path in paths:
        if path.relative_to(root).as_posix() in held_out:
            continue
        try:
            text = path.read_text(encoding="utf-8")[:6000].rstrip()
        except UnicodeDecodeError:
            continue
        if len(text) > 200:
            yield text
            size -= len(text)
        if size <= 0:
            return
