"""A progress bar for what takes longer than two seconds, and only on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE_SECONDS = 2.0


@contextmanager
def progress_bar(label: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Yield `advance(n)`. The bar goes to standard error, so `--json` stays clean."""
    if quiet or not sys.stderr.isatty():
        yield lambda n: None
        return
    bar: Any = None
    task: Any = None
    done = 0
    start = time.monotonic()

    def advance(n: int) -> None:
        nonlocal bar, task, done
        done += n
        if bar is None and time.monotonic() - start > PATIENCE_SECONDS and done < total:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            bar.start()
            task = bar.add_task(label, total=total)
        if bar is not None:
            bar.update(task, completed=done)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()
