"""RESULTS.md: one section a benchmark, each replaced on its own, with what it was measured on."""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

from benchmarks.measure import CpuTimes
from benchmarks.peers import ROOT, Peers

RESULTS = ROOT / "benchmarks" / "RESULTS.md"
_INTRO = """\
# Results

dsq beside llama.cpp's own tools, both in one run, by `make bench` (`python -m benchmarks.run`).
Each section is written by its benchmark and says when and on what. Times are medians; a ratio is
dsq's median over the peer's. The goals are goals: what is measured is what stands here.
"""


@dataclass(frozen=True)
class Section:
    """What a benchmark found: Markdown, under its title."""

    name: str
    title: str
    body: str


@dataclass(frozen=True)
class Goal:
    """A bound on a figure, and whether it is met."""

    bound: float
    at_least: bool = False
    unit: str = "×"

    def verdict(self, value: float) -> str:
        sign = "≥" if self.at_least else "≤"
        met = value >= self.bound if self.at_least else value <= self.bound
        return f"{sign} {self.bound:g} {self.unit}: {'met' if met else '**missed**'}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`12.3 (12.1 … 12.9)`: median, least and most."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    low, high = min(values), max(values)
    return f"{median(values):.{digits}f} ({low:.{digits}f} … {high:.{digits}f})"


def conditions(peers: Peers | None, repeat: int, before: CpuTimes, busy: float) -> str:
    """When, on what, with which versions, and how quiet it was."""
    busy_now, stolen = CpuTimes.now().since(before)
    packages = [f"{name} {version(name)}" for name in ("llama-cpp-python", "numpy", "gguf")]
    lines = [
        f"- {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC, "
        f"{repeat} run{'s' if repeat > 1 else ''} of each",
        f"- {_machine()}",
        f"- dsq {version('dsq')} ({_commit()}), Python {platform.python_version()}, "
        + ", ".join(packages),
    ]
    if peers is not None:
        converter = [f"{name} {version(name)}" for name in ("torch", "transformers")]
        lines.append(f"- peer: {peers.version}; its converter runs on {', '.join(converter)}")
    lines.append(
        f"- the machine was {100 * busy:.0f} % busy before the run; during it "
        f"{100 * busy_now:.0f} % of the processor time was used, and {100 * stolen:.1f} % was "
        "taken by the host's other guests"
    )
    return "\n".join(lines)


def _machine() -> str:
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    cores = len(Path("/proc/self/status").read_text()) and _cores()
    return (
        f"{cpu[1].strip() if cpu else platform.machine()}, {cores} cores, "
        f"{int(memory[1]) / 2**20 if memory else 0:.0f} GiB of memory, {_disk()}, "
        f"{platform.system()} {platform.release()}"
    )


def _cores() -> int:
    from dsq.quant.threads import default_threads

    return default_threads()


def _disk() -> str:
    """File system and device of the repository."""
    done = subprocess.run(
        ["df", "--output=source,fstype", ROOT], capture_output=True, text=True, check=False
    )
    words = done.stdout.splitlines()[-1].split() if done.returncode == 0 else []
    return f"{words[1]} on {words[0]}" if len(words) == 2 else "unknown disk"


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "no git"
    paths = ["quant", "convert", "runtime", "tokenizer_port", "cli", "dsq"]
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", *paths], capture_output=True, text=True
    )
    return head.stdout.strip() + (", with uncommitted changes" if changed.stdout.strip() else "")


def write(section: Section, path: Path = RESULTS) -> None:
    """Put the section in the file, in place of the one with its name."""
    text = path.read_text(encoding="utf-8") if path.exists() else _INTRO
    begin, end = f"<!-- {section.name} -->", f"<!-- /{section.name} -->"
    block = f"{begin}\n## {section.title}\n\n{section.body.strip()}\n{end}"
    if begin in text:
        before, _, rest = text.partition(begin)
        text = before + block + rest.partition(end)[2]
    else:
        text = f"{text.rstrip()}\n\n{block}\n"
    path.write_text(text, encoding="utf-8")
