"""Peak memory and bytes written, on a 1.3b-shaped model and on a 6.7b-shaped one."""

from __future__ import annotations

from pathlib import Path

from benchmarks.measure import Usage, run
from benchmarks.models import SHAPES, need, random_checkpoint, size_bytes
from benchmarks.results import Section, table
from benchmarks.settings import Settings, dsq, remove, say

TYPES = ("q8_0", "q4_k_m")
GOAL_BYTES = 1 << 30
# Room for what is written to the terminal: the report of --json.
REPORT_BYTES = 1 << 16

_HOW = """\
`/proc/PID/status` of the process and its children, every 20 ms. Anonymous memory is what the
program holds for itself; mapped pages are the checkpoint's own, which the kernel takes back when
it needs them. The goal is at most 1 GiB of anonymous memory, whatever the model's size. Written is
what was given to `write(2)` in all (`wchar`), beside the size of the artifact. The peer is measured
on the 1.3b shape only: on the other its 16-bit file takes as much again as the checkpoint."""


def benchmark(settings: Settings) -> Section:
    rows = []
    for name in ("tiny", "small") if settings.quick else ("1.3b", "6.7b"):
        source = random_checkpoint(settings.work, SHAPES[name])
        need(settings.work, (3 if name in ("1.3b", "tiny") else 1) * size_bytes(source))
        # A K-quant of the larger shape takes minutes and the same memory.
        for kind in TYPES if name in ("1.3b", "tiny") else TYPES[:1]:
            rows.append(_ours(settings, name, source, kind))
            if name in ("1.3b", "tiny"):
                rows.append(_theirs(settings, name, source, kind))
    verified = _verify(settings, source, "q4_0")  # of the larger model
    header = ["model", "type", "side", "checkpoint", "anonymous", "goal", "mapped", "VmHWM"]
    body = _HOW + "\n\n" + table([*header, "written", "artifact", "written ÷ artifact"], rows)
    body += f"\n\n{verified}"
    return Section("memory", "Memory and bytes written", body)


def _ours(settings: Settings, name: str, source: Path, kind: str) -> list[str]:
    out = settings.work / "ours.gguf"
    try:
        used = run(dsq("quantize", kind, source, "-o", out, "--json", "--force"), sample=True)
        return _row(name, kind, "dsq", source, [used], out)
    finally:
        remove([out])


def _verify(settings: Settings, source: Path, kind: str) -> str:
    """The peak of `dsq verify` with its logits, layer by layer."""
    out = settings.work / "ours.gguf"
    receipt = settings.work / "receipt.json"
    try:
        run(dsq("quantize", kind, source, "-o", out, "--json", "--force"), sample=False)
        command = dsq("verify", out, "--source", source, "--receipt", receipt, "--json")
        used = run(command, sample=True)
        peak = used.resident or 0
        say(f"memory verify {kind}: {_gib(peak)} resident")
        return (
            f"`dsq verify` of the {kind} artifact against the {_gib(size_bytes(source))} "
            f"checkpoint, logits included: {_gib(used.anonymous or 0)} anonymous, {_gib(peak)} "
            f"resident with mapped pages, {used.seconds:.0f} s "
            f"(goal: a 6.7b within 8 GiB: {'met' if peak <= 8 << 30 else '**missed**'})."
        )
    finally:
        remove([out, receipt])


def _theirs(settings: Settings, name: str, source: Path, kind: str) -> list[str]:
    bf16, out = settings.work / "bf16.gguf", settings.work / "theirs.gguf"
    peers = settings.peers
    commands = [
        peers.convert(source, "bf16", bf16),
        peers.quantize(bf16, out, kind, settings.threads),
    ]
    try:
        steps = [run(command, env=peers.env, sample=True) for command in commands]
        return _row(name, kind, "peer", source, steps, out)
    finally:
        remove([bf16, out])


def _row(name: str, kind: str, side: str, source: Path, steps: list[Usage], out: Path) -> list[str]:
    size = out.stat().st_size
    anonymous = max(step.anonymous or 0 for step in steps)
    written = sum(step.written for step in steps)
    say(f"memory {name} {kind} {side}: {_gib(anonymous)} anonymous")
    verdict = "met" if anonymous <= GOAL_BYTES else "**missed**"
    # The report on the terminal is written, too, and is no part of the artifact.
    ratio = "1.00" if 0 <= written - size < REPORT_BYTES else f"{written / size:.2f}"
    return [
        name,
        kind,
        side,
        _gib(size_bytes(source)),
        _gib(anonymous),
        f"≤ 1 GiB: {verdict}" if side == "dsq" else "",
        _gib(max(step.mapped or 0 for step in steps)),
        _gib(max(step.resident or 0 for step in steps)),
        f"{written:,}",
        f"{size:,}",
        ratio,
    ]


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"
