"""What every benchmark is told, and the commands of our side."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers import Peers, find_peers


@dataclass(frozen=True)
class Settings:
    """`quick` proves that a benchmark runs, on small models; its figures mean nothing."""

    work: Path
    repeat: int
    quick: bool
    text: Path
    chunks: int
    threads: int

    @property
    def peers(self) -> Peers:
        return find_peers()


def dsq(*args: str | Path) -> list[str | Path]:
    """The command line `dsq …`, in this Python."""
    return [sys.executable, "-m", "dsq.cli.main", *args]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
