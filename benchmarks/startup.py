"""How long until `dsq --help` and `dsq inspect` have answered."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.measure import run
from benchmarks.models import SHAPES, random_checkpoint, size_bytes
from benchmarks.results import Goal, Section, spread, table
from benchmarks.settings import Settings

RUNS = 20
HELP_GOAL = Goal(0.15, unit="s")
INSPECT_GOAL = Goal(0.5, unit="s")


def benchmark(settings: Settings) -> Section:
    shape = SHAPES["tiny" if settings.quick else "6.7b"]
    # Only headers are read, so the data may be holes: 14 GB of model that take no disk.
    model = random_checkpoint(settings.work, shape, holes=True)
    script = Path(sys.executable).with_name("dsq")
    commands: dict[str, tuple[list[str | Path], Goal | None]] = {
        "`python -c pass`, to compare": ([sys.executable, "-c", "pass"], None),
        "`dsq --help`": ([script, "--help"], HELP_GOAL),
        f"`dsq inspect` of a {shape.name}-shaped checkpoint, {size_bytes(model) / 1e9:.1f} GB": (
            [script, "inspect", model],
            INSPECT_GOAL,
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(3 if settings.quick else RUNS):
        for name, (command, _goal) in commands.items():
            times[name].append(run(command).seconds)
    rows = []
    for name, (_command, goal) in commands.items():
        ordered = sorted(times[name])
        verdict = goal.verdict(ordered[len(ordered) // 2]) if goal else ""
        rows.append([name, spread(ordered, 3), verdict])
    body = (
        f"{len(ordered)} runs of each in turn, files in the page cache. The checkpoint has its "
        "headers and sizes but holes for data: `inspect` reads headers only.\n\n"
        + table(["command", "seconds", "goal"], rows)
    )
    return Section("startup", "Start-up", body)
