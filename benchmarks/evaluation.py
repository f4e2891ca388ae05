"""`dsq eval` beside llama-perplexity: tokens per second, and the perplexity itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.measure import run, settle, warm
from benchmarks.models import SHAPES, random_checkpoint, smollm2
from benchmarks.results import Goal, Section, spread, table
from benchmarks.settings import Settings, dsq, remove, say

TYPES = ("bf16", "q8_0", "q4_0", "q4_k_m")
N_CTX = 512
GOAL = Goal(0.9, at_least=True)


@dataclass(frozen=True)
class Score:
    """One run: perplexity, its printed error, tokens a second, seconds of the whole command."""

    ppl: float
    error: float
    speed: float
    seconds: float


def benchmark(settings: Settings) -> Section:
    source = (
        random_checkpoint(settings.work, SHAPES["tiny"])
        if settings.quick
        else smollm2(settings.work)
    )
    rows = [_row(settings, source, kind) for kind in TYPES]
    header = ["type", "dsq, tokens/s", "peer, tokens/s", "ratio", "goal", "whole command, ratio"]
    body = (
        f"{'A random model' if settings.quick else 'SmolLM2-135M-Instruct'} on "
        f"`{settings.text.name}`: {settings.chunks} windows of {N_CTX} tokens, the second half of "
        f"each scored, {settings.threads} threads, both sides in turn.\n{_HOW}\n\n"
        + table([*header, "dsq's PPL", "peer's PPL", "difference ÷ printed error"], rows)
    )
    return Section("eval", "Evaluation", body)


_HOW = """\
(SmolLM2's weights lie on Q4_1's grid, so noise of 0.3 of each block's step was added, `--dither
0.3`; the GGUF files are dsq's.) Tokens per second count all tokens of the windows. dsq reports its
own: computing logits and scoring them, without loading and tokenizing. llama-perplexity prints no
such figure, so it is computed from its own log's timestamps (`--log-timestamps`), from "calculating
perplexity" to "Final estimate": the same work, loading and tokenizing left out. Its warm-up run
lies before that; dsq makes none."""


def _row(settings: Settings, source: Path, kind: str) -> list[str]:
    gguf = settings.work / f"eval-{kind}.gguf"
    run(dsq("convert", source, "--to", "gguf", "--outtype", kind, "-o", gguf, "--force"))
    ours: list[Score] = []
    theirs: list[Score] = []
    sides: list[tuple[str, Callable[[Settings, Path], Score], list[Score]]] = [
        ("dsq", _dsq, ours),
        ("peer", _llama_perplexity, theirs),
    ]
    try:
        for _ in range(settings.repeat):
            for side, score, found in sides:
                settle()
                warm([gguf])
                found.append(score(settings, gguf))
                say(f"eval {kind} {side}: {found[-1].speed:.0f} tokens/s, PPL {found[-1].ppl:.4f}")
    finally:
        remove([gguf])
    ratio = median(s.speed for s in ours) / median(s.speed for s in theirs)
    whole = median(s.seconds for s in ours) / median(s.seconds for s in theirs)
    a, b = ours[0], theirs[0]
    return [
        kind,
        spread([s.speed for s in ours], 0),
        spread([s.speed for s in theirs], 0),
        f"**{ratio:.2f}**",
        GOAL.verdict(ratio),
        f"{whole:.2f}",
        f"{a.ppl:.4f} ± {a.error:.4f}",
        f"{b.ppl:.4f} ± {b.error:.4f}",
        f"{abs(a.ppl - b.ppl):.4f} ÷ {b.error:.4f} = {abs(a.ppl - b.ppl) / b.error:.3f}",
    ]


def _dsq(settings: Settings, gguf: Path) -> Score:
    options = ["-c", str(N_CTX), "--chunks", str(settings.chunks), "-t", str(settings.threads)]
    used = run(dsq("eval", gguf, "--text", settings.text, *options, "--json"))
    report = json.loads(used.output)
    return Score(report["ppl"], report["ppl_stderr"], report["tokens_per_second"], used.seconds)


def _llama_perplexity(settings: Settings, gguf: Path) -> Score:
    command = settings.peers.perplexity(
        gguf,
        settings.text,
        n_ctx=N_CTX,
        chunks=settings.chunks,
        threads=settings.threads,
    )
    used = run(command)
    begin = re.search(r"^([\d.]+) .*calculating perplexity over (\d+) chunks", used.output, re.M)
    end = re.search(r"^([\d.]+) .*Final estimate: PPL = (\S+) \+/- (\S+)", used.output, re.M)
    if begin is None or end is None:
        raise RuntimeError(f"llama-perplexity printed no estimate:\n{used.output[-2000:]}")
    seconds = _clock(end[1]) - _clock(begin[1])
    speed = int(begin[2]) * N_CTX / seconds
    return Score(float(end[2]), float(end[3]), speed, used.seconds)


def _clock(stamp: str) -> float:
    """llama.cpp's `minutes.seconds.milliseconds.microseconds`."""
    minutes, seconds, milli, micro = (int(part) for part in stamp.split("."))
    return 60 * minutes + seconds + milli / 1e3 + micro / 1e6
