"""HF → q4_0, q8_0, q4_k_m: dsq in one pass, llama.cpp's converter and llama-quantize in two."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.measure import Usage, fsync_seconds, run, settle, warm
from benchmarks.models import (
    SHAPES,
    need,
    random_checkpoint,
    size_bytes,
    smollm2,
    weight_files,
)
from benchmarks.peers import ROOT
from benchmarks.results import Goal, Section, spread, table
from benchmarks.settings import Settings, dsq, remove, say
from dsq.convert.gguf.reader import read_gguf

TYPES = ("q4_0", "q8_0", "q4_k_m")
GOALS = {
    "1.3b": {"q4_0": 0.4, "q8_0": 0.4, "q4_k_m": 0.75},
    "smollm2": {"q4_0": 0.4, "q8_0": 0.4, "q4_k_m": 0.4},
}
COPY_GOAL = Goal(1.3)
INSIDE_GOAL = Goal(85, at_least=True, unit="%")
# Two goals are for a model of full size: half of SmolLM2's second is Python starting, and its
# 576-wide rows get no K-quants.
FULL_SIZE = "1.3b"
TWO_STEPS, ONE_STEP = "two steps", "`--outtype q8_0`"


@dataclass
class Measured:
    """The runs of one model and type. A peer's run is a list of its steps."""

    ours: list[Usage] = field(default_factory=list)
    inside: list[dict[str, float]] = field(default_factory=list)
    theirs: dict[str, list[list[Usage]]] = field(default_factory=dict)
    their_sync: list[float] = field(default_factory=list)
    identical: dict[str, str] = field(default_factory=dict)

    def road_seconds(self, road: str) -> list[float]:
        return [sum(step.seconds for step in steps) for steps in self.theirs[road]]

    @property
    def best_road(self) -> str:
        return min(self.theirs, key=lambda road: median(self.road_seconds(road)))

    @property
    def our_seconds(self) -> list[float]:
        return [usage.seconds for usage in self.ours]


def benchmark(settings: Settings) -> Section:
    models = _models(settings)
    parts = [_HOW]
    for name, source in models.items():
        copies = [_copy_seconds(source) for _ in range(settings.repeat)]
        found = {kind: _measure(settings, name, source, kind) for kind in TYPES}
        parts.append(_report(name, source, found, copies, settings.threads))
    return Section("convert", "Hugging Face checkpoint → quantized GGUF", "\n\n".join(parts))


def _models(settings: Settings) -> dict[str, Path]:
    if settings.quick:
        return {"small": random_checkpoint(settings.work, SHAPES["small"])}
    return {
        "1.3b": random_checkpoint(settings.work, SHAPES["1.3b"]),
        "smollm2": smollm2(settings.work),
    }


def _measure(settings: Settings, name: str, source: Path, kind: str) -> Measured:
    """Both sides in turn, `repeat` times; the tensor data is compared the first time."""
    # Ours, the peer's 16-bit file and its result lie side by side for the comparison.
    need(settings.work, 3 * size_bytes(source))
    found = Measured()
    ours, bf16, theirs = (settings.work / f"{n}.gguf" for n in ("ours", "bf16", "theirs"))
    peers = settings.peers
    roads = {
        TWO_STEPS: [
            peers.convert(source, "bf16", bf16),
            peers.quantize(bf16, theirs, kind, settings.threads),
        ]
    }
    if kind == "q8_0":
        roads[ONE_STEP] = [peers.convert(source, "q8_0", theirs)]
    try:
        for i in range(settings.repeat):
            _quiet(source, ours)
            found.ours.append(run(dsq("quantize", kind, source, "-o", ours, "--json")))
            say(f"{name} {kind}: dsq {found.ours[-1].seconds:.2f} s")
            for road, commands in roads.items():
                _quiet(source, theirs, bf16)
                steps = [run(command, env=peers.env) for command in commands]
                found.theirs.setdefault(road, []).append(steps)
                if road == TWO_STEPS:
                    found.their_sync.append(fsync_seconds(theirs))
                say(
                    f"{name} {kind}: peer, {road} {' + '.join(f'{s.seconds:.2f}' for s in steps)} s"
                )
                if i == 0:
                    found.identical[road] = compare(ours, theirs)
            _quiet(source, ours, theirs, bf16)
            inside: list[str | Path] = [
                sys.executable,
                "-m",
                "benchmarks.inside",
                source,
                kind,
                ours,
            ]
            found.inside.append(json.loads(run(inside, cwd=ROOT).output))
    finally:
        remove((ours, bf16, theirs))
    return found


def _quiet(source: Path, *outputs: Path) -> None:
    """The same start for everybody: no outputs, a warm source, an idle disk."""
    remove(outputs)
    settle()
    warm(weight_files(source))


def _copy_seconds(source: Path) -> float:
    """`cp` of the source's weight files to the same disk, until they are on it (fsync)."""
    target = source.with_name(source.name + ".copy")
    target.mkdir()
    try:
        _quiet(source)
        copied = run(["cp", "--reflink=never", *weight_files(source), target])
        return copied.seconds + sum(fsync_seconds(path) for path in target.iterdir())
    finally:
        shutil.rmtree(target)


def compare(ours: Path, theirs: Path) -> str:
    """`identical`, or which tensors differ."""
    a, b = read_gguf(ours), read_gguf(theirs)
    if set(a.tensors) != set(b.tensors):
        return f"other tensors: {sorted(set(a.tensors) ^ set(b.tensors))[:4]}"
    different = [
        name
        for name, info in a.tensors.items()
        if info.type is not b.tensors[name].type or not np.array_equal(a.data(name), b.data(name))
    ]
    return f"{len(different)} tensors differ, e.g. {different[0]}" if different else "identical"


_HOW = """\
dsq's time is the whole command, `dsq quantize TYPE CHECKPOINT`: starting Python, reading, checking
every weight for NaN and Inf, quantizing, writing, and `fsync`. The peer's is
`convert_hf_to_gguf.py --outtype bf16` and then `llama-quantize` with as many threads as dsq; for
q8_0 also the converter alone with `--outtype q8_0`, and the better of the two roads counts. The
peer does not `fsync`; what that would add is shown and not counted. The sources are in the page
cache for both (if memory holds them), outputs are deleted between runs."""


def _report(
    name: str, source: Path, found: Mapping[str, Measured], copies: list[float], threads: int
) -> str:
    what = {
        "smollm2": "SmolLM2-135M-Instruct, bf16, noise of 0.3 of each Q4_1 block's step added "
        "(`--dither 0.3`), because its weights lie on Q4_1's grid",
        "1.3b": "random weights in the shape of DeepSeek Coder 1.3b, with SmolLM2's tokenizer and "
        "so 49,152 rows instead of 32,256",
    }.get(name, "random weights; a trial")
    size = f"{size_bytes(source) / 1e9:.2f} GB"
    parts = [f"### {name}: {what}; {size}"]
    parts.append(
        table(
            ["type", "dsq, s", "peer, s", "peer's road", "ratio", "goal", "tensor data"],
            [_row(name, kind, measured) for kind, measured in found.items()],
        )
    )
    parts.append(
        table(
            ["type", "dsq's CPU s", "peer's CPU s", "peer's steps, s", "peer's fsync, s"],
            [_detail(kind, measured) for kind, measured in found.items()],
        )
    )
    parts.append(
        f"Where dsq's time goes, in {threads} × the wall time of an in-process run "
        "(`benchmarks/inside.py`): thread time in each function.\n\n"
        + table(
            ["type", "ggml's quantizer", "goal", "to float32", "finite?", "all of the CPU time"],
            [_inside(name, kind, measured) for kind, measured in found.items()],
        )
    )
    q8 = median(found["q8_0"].our_seconds)
    ratio = q8 / median(copies)
    verdict = f" ({COPY_GOAL.verdict(ratio)})" if name == FULL_SIZE else ""
    parts.append(
        f"Copying the checkpoint's {size} (`cp`, then `fsync`): {spread(copies)} s. dsq q8_0, "
        f"which also ends with `fsync`: {q8:.2f} s, {ratio:.2f} ×{verdict}."
    )
    return "\n\n".join(parts)


def _row(name: str, kind: str, measured: Measured) -> list[str]:
    road = measured.best_road
    theirs = measured.road_seconds(road)
    ratio = median(measured.our_seconds) / median(theirs)
    bound = GOALS.get(name, {}).get(kind)
    return [
        kind,
        spread(measured.our_seconds),
        spread(theirs),
        road,
        f"**{ratio:.2f}**",
        Goal(bound).verdict(ratio) if bound else "",
        "; ".join(
            same if other == TWO_STEPS else f"{other}: {same}"
            for other, same in measured.identical.items()
        ),
    ]


def _detail(kind: str, measured: Measured) -> list[str]:
    def steps() -> Iterator[str]:
        for road, runs in measured.theirs.items():
            medians = [f"{median(s.seconds for s in step):.2f}" for step in zip(*runs, strict=True)]
            yield f"{road}: {' + '.join(medians)}"

    best = measured.theirs[measured.best_road]
    return [
        kind,
        f"{median(usage.cpu_seconds for usage in measured.ours):.2f}",
        f"{median(sum(step.cpu_seconds for step in steps) for steps in best):.2f}",
        "; ".join(steps()),
        spread(measured.their_sync),
    ]


def _inside(name: str, kind: str, measured: Measured) -> list[str]:
    def share(key: str) -> float:
        return 100 * median(r[key] / (r["seconds"] * r["cores"]) for r in measured.inside)

    quantizing = share("quantize")
    return [
        kind,
        f"{quantizing:.0f} %",
        INSIDE_GOAL.verdict(quantizing) if kind == "q4_k_m" and name == FULL_SIZE else "",
        f"{share('to_float'):.0f} %",
        f"{share('finite'):.0f} %",
        f"{share('cpu'):.0f} %",
    ]
