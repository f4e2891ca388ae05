"""What one rendering of a chat template may use: steps, seconds, and the size of what it builds."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from jinja2.exceptions import SecurityError

MAX_STEPS = 1_000_000
MAX_SECONDS = 5.0
MAX_SIZE = 4 * 2**20  # characters of one value (8 for an element), and of the whole output
MAX_TOTAL = 64 * 2**20  # of all values together
MAX_DEPTH = 200  # of one value: hashing nested tuples takes the C stack, and checks nothing
ELEMENT = 8
CONTAINERS = (Mapping, list, tuple, set, frozenset)


class _Budget:
    def __init__(self) -> None:
        self.steps = MAX_STEPS
        self.size = MAX_TOTAL
        self.deadline = time.monotonic() + MAX_SECONDS


_BUDGET: ContextVar[_Budget] = ContextVar("budget")


def start_budget() -> None:
    _BUDGET.set(_Budget())


def tick() -> None:
    """One step more."""
    budget = _BUDGET.get()
    budget.steps -= 1
    if budget.steps < 0:
        raise SecurityError(f"it takes more than {MAX_STEPS} steps")
    if time.monotonic() > budget.deadline:
        raise SecurityError(f"it takes more than {MAX_SECONDS:.0f} seconds")


def spend(size: int) -> None:
    """So much more is built, in one value."""
    budget = _BUDGET.get()
    budget.size -= size
    if size > MAX_SIZE or budget.size < 0:
        raise SecurityError(f"it builds values larger than {MAX_SIZE}, or {MAX_TOTAL} in all")


def spend_copy(value: Any) -> None:
    """A string or a container is copied, not what is in it."""
    if isinstance(value, str):
        spend(len(value))
    elif isinstance(value, CONTAINERS):
        spend(ELEMENT * (ELEMENT + len(value)))


def size(value: Any) -> int:
    """How long a value's text could be, counting shared parts as often as they would be written."""
    total = measure(value)
    spend(total)
    return total


def measure(value: Any) -> int:
    """The same, for what is only walked through: compared, hashed, handed on.

    Raises SecurityError for a value that is too large or nested too deeply for that.
    """
    total = 0
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            total += len(item) if isinstance(item, (str, bytes)) else ELEMENT
            if isinstance(item, int):
                total += item.bit_length() // 3
            elif isinstance(item, Mapping):
                below.extend(item.keys())
                below.extend(item.values())
            elif isinstance(item, (list, tuple, set, frozenset)):
                below.extend(item)
            if total + len(below) > MAX_SIZE:
                raise SecurityError(f"it uses values larger than {MAX_SIZE}")
        if not below:
            return total
        level = below
    raise SecurityError(f"it nests values more than {MAX_DEPTH} deep")


def bounded(iterable: Iterable[Any]) -> Iterator[Any]:
    """Each element is a step."""
    for item in iterable:
        tick()
        yield item
