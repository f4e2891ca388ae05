"""How fast weights come out of memory: what bounds the tokens per second of one sequence."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dsq.errors import InputError
from dsq.quant.threads import default_threads

_BYTES = 256 << 20  # beyond a processor's caches
_MOST_SECONDS = 1.5
_AGREE = 5  # passes within _SPREAD of the best: nothing else uses the memory now
_SPREAD = 0.03


@dataclass(frozen=True)
class Card:
    """A graphics card by its data sheet: `bandwidth` in bytes per second, `vram` in bytes."""

    name: str
    bandwidth: float
    vram: int


def _card(name: str, gb_per_second: float, gib: int) -> Card:
    return Card(name, gb_per_second * 1e9, gib << 30)


# NVIDIA's and AMD's data sheets. What is computed from them is a bound, not a measurement.
CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        _card("gtx-1080-ti", 484, 11),
        _card("rtx-2060", 336, 6),
        _card("rtx-2080-ti", 616, 11),
        _card("rtx-3060", 360, 12),
        _card("rtx-3070", 448, 8),
        _card("rtx-3080", 760, 10),
        _card("rtx-3090", 936, 24),
        _card("rtx-4060", 272, 8),
        _card("rtx-4060-ti-16gb", 288, 16),
        _card("rtx-4070", 504, 12),
        _card("rtx-4080", 717, 16),
        _card("rtx-4090", 1008, 24),
        _card("rtx-5070", 672, 12),
        _card("rtx-5080", 960, 16),
        _card("rtx-5090", 1792, 32),
        _card("rx-7900-xtx", 960, 24),
        _card("t4", 320, 16),
        _card("l4", 300, 24),
        _card("l40s", 864, 48),
        _card("a10", 600, 24),
        _card("a100-40gb", 1555, 40),
        _card("a100-80gb", 2039, 80),
        _card("h100-pcie", 2000, 80),
        _card("h100-sxm", 3350, 80),
        _card("h200", 4800, 141),
    )
}


def card(name: str) -> Card:
    """The card called `name`, as people write it. Raises InputError, listing the names."""
    key = "-".join(name.lower().replace("_", " ").replace("-", " ").split())
    key = key.removeprefix("nvidia-").removeprefix("geforce-").removeprefix("amd-radeon-")
    found = CARDS.get(key)
    if found is None:
        raise InputError(
            f"card {name!r} is not in the table: give --vram and --bandwidth, or one of "
            f"{', '.join(CARDS)}"
        )
    return found


@functools.cache
def memory_bandwidth(n_threads: int | None = None) -> float:
    """Bytes per second that this machine reads with `n_threads`, measured once a process.

    memchr goes through memory as fast as any code does, and ctypes lets the threads run at once.
    Others' work only slows a pass down: the best counts, and passes go on until some agree with it
    (a quarter second on an idle machine) or the time is over.
    """
    import numpy as np

    threads = n_threads or default_threads()
    memchr = ctypes.CDLL(None).memchr
    memchr.restype, memchr.argtypes = (
        ctypes.c_void_p,
        (
            ctypes.c_void_p,
            ctypes.c_int,
            ctypes.c_size_t,
        ),
    )
    data = np.ones(_BYTES, np.uint8)  # written, so that every page is a page of its own
    part = _BYTES // threads
    starts = [data.ctypes.data + i * part for i in range(threads)]

    def read(start: int) -> None:
        memchr(start, 2, part)  # a byte that is not there

    rates: list[float] = []
    end = time.perf_counter() + _MOST_SECONDS
    with ThreadPoolExecutor(threads) as pool:
        while not _steady(rates) and time.perf_counter() < end:
            begin = time.perf_counter()
            list(pool.map(read, starts))
            rates.append(part * threads / (time.perf_counter() - begin))
    return max(rates)


def _steady(rates: Sequence[float]) -> bool:
    """Whether enough passes were as fast as the fastest."""
    return sum(rate >= max(rates) * (1 - _SPREAD) for rate in rates) >= _AGREE
