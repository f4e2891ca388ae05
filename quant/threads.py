"""How many threads to compute with."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def default_threads() -> int:
    """Physical cores this process may use.

    Respects the affinity mask and a cgroup's CPU quota: more threads than that spin at each
    other's barriers. A core's second hardware thread adds nothing to matrix products.
    """
    if hasattr(os, "sched_getaffinity"):
        usable = os.sched_getaffinity(0)
    else:
        usable = set(range(os.cpu_count() or 1))
    cores = len(usable)
    if sys.platform == "linux":
        cores = len({_siblings(cpu) for cpu in usable})
        cores = min(cores, _quota() or cores)
    return max(1, cores)


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
