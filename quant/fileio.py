"""Plain reads and writes at a place in a file, whole or not at all.

Not memory maps: a full disk is an OSError here, and SIGBUS there; and what was read does not count
as the process's memory.
"""

from __future__ import annotations

import os


def reserve(file: int, n_bytes: int) -> None:
    """Take the space now: a full disk is told before hours of work, not after."""
    if hasattr(os, "posix_fallocate") and n_bytes:
        os.posix_fallocate(file, 0, n_bytes)
    os.ftruncate(file, n_bytes)


def write_at(file: int, data: bytes | memoryview, at: int) -> None:
    view = memoryview(data)
    while view:  # the kernel writes at most 2 GiB at once
        n = os.pwrite(file, view, at)
        view, at = view[n:], at + n


def read_at(file: int, into: memoryview, at: int) -> None:
    """Fill `into` (writable bytes). Raises OSError when the file ends before."""
    while into:
        n = os.preadv(file, [into], at)
        if n == 0:
            raise OSError(f"the file ends at byte {at}")
        into, at = into[n:], at + n
