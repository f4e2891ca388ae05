"""How many threads to compute with."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SAMPLE_SECONDS = 0.1  # ten ticks of /proc/stat


def default_threads() -> int:
    """Physical cores that this process may use.

    Respects the affinity mask and a cgroup's CPU quota. A core's second hardware thread adds
    nothing to matrix products. The same on a busy machine, so that what depends on the number of
    threads (torch's sums) can be repeated.
    """
    usable = _usable()
    cores = len(usable)
    if sys.platform == "linux":
        cores = len({_siblings(cpu) for cpu in usable})
        cores = min(cores, _quota() or cores)
    return max(1, cores)


def free_cores() -> int:
    """`default_threads`, less those that other processes keep busy: for llama.cpp.

    Its threads meet at spin barriers, hundreds of times a token: one thread that has to share its
    core holds up all the others (benchmarks/oversubscription.py). How busy the machine is gets
    looked at once a process, so that all of a run computes with one number.
    """
    return max(1, default_threads() - round(_busy_elsewhere()))


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """Within, torch computes with `n` threads; afterwards with as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _usable() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


@functools.cache
def _busy_elsewhere() -> float:
    """Of the CPUs this process may use, how many others keep busy now; 0 where nobody can tell.

    The load average lags a minute behind and counts what this process's predecessor in a script
    did, so it only says whether a look at the CPUs' own counters is worth its tenth of a second.
    """
    usable = _usable()
    try:
        if os.getloadavg()[0] < 0.5:
            return 0.0
    except OSError:
        return 0.0
    before, mine = _busy_seconds(usable), sum(os.times()[:2])
    start = time.monotonic()
    time.sleep(_SAMPLE_SECONDS)
    after, mine_after = _busy_seconds(usable), sum(os.times()[:2])
    if before is None or after is None:
        return 0.0
    elapsed = time.monotonic() - start
    return max(0.0, (after - before - (mine_after - mine)) / elapsed)


def _busy_seconds(usable: set[int], path: Path = Path("/proc/stat")) -> float | None:
    """Seconds that these CPUs have worked since boot (user, nice, system, interrupts); None
    without /proc/stat. A host's stolen time counts too: it is not there to be used."""
    try:
        lines = path.read_text().splitlines()
        ticks = 0
        for line in lines:
            name, *values = line.split()
            if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in usable:
                user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, values[:8])
                ticks += user + nice + system + irq + softirq + steal
        return ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None


def _siblings(cpu: int) -> str:
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return path.read_text()
    except OSError:  # no sysfs (some containers): every CPU counts
        return str(cpu)


def _quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> int | None:
    """CPUs of the cgroup's quota, rounded up; None without one."""
    try:
        quota, period = path.read_text().split()[:2]
        return None if quota == "max" else -(-int(quota) // int(period))
    except (OSError, ValueError):
        return None
