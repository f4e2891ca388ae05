"""How long a draft pays: what a step of more rows costs, against how likely the guesses are right.

A step of n rows costs less than n steps of one, by how much depends on model, machine and n: where
the weights wait for memory the further rows are nearly free; on two slow cores each costs half of a
step; and kernels that work on tiles make some n dearer than n + 1. So the costs are measured while
serving, and a draft gets the length with the most tokens a second to be expected, which is often
none at all.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

_SLOPE = 0.2  # cost of a row in steps of one row, as long as nothing is known
_FORGET = 1000  # steps after which a measured cost is forgotten, so that drafts are tried again
_SAMPLES = 5
_LEAST = 0.02  # chance of a guess that is looked at
_GAIN = 1.02  # what a draft must promise at least: the measured costs are not exact


class StepCost:
    """Seconds of a step by its rows."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = {}
        self._last: dict[int, int] = {}  # when a number of rows was seen last
        self._n_steps = 0
        self._points: tuple[list[int], list[float]] | None = ([], [])

    def observe(self, rows: int, seconds: float) -> None:
        self._n_steps += 1
        self._seen.setdefault(rows, deque(maxlen=_SAMPLES)).append(seconds)
        self._last[rows] = self._n_steps
        for n in [n for n, when in self._last.items() if self._n_steps - when > _FORGET]:
            del self._seen[n], self._last[n]
        self._points = None

    @property
    def reach(self) -> int:
        """Beyond so many rows the costs are guesswork; from here they are tried."""
        return 2 * max(self._seen, default=1) + 2

    def seconds(self, rows: int) -> float:
        """Measured, or between and beyond the measured ones by a straight line's shape. Without
        any, in steps of one row."""
        if self._points is None:
            # Their medians: a hiccup of the machine says nothing.
            where = sorted(self._seen)
            self._points = where, [median(self._seen[n]) / _line(n) for n in where]
        where, scales = self._points
        if not where:
            return _line(rows)
        i = bisect_left(where, rows)
        if i == len(where) or i == 0:
            return _line(rows) * scales[min(i, len(where) - 1)]
        share = (rows - where[i - 1]) / (where[i] - where[i - 1])
        return _line(rows) * (scales[i - 1] + share * (scales[i] - scales[i - 1]))


def _line(rows: int) -> float:
    return 1 + _SLOPE * (rows - 1)


@dataclass
class Batch:
    """A step in the making: its rows, the tokens that it should give, and seconds beside it."""

    rows: int
    tokens: float
    seconds: float = 0.0

    def add(self, n: int, chance: float) -> None:
        """A draft of n guesses."""
        self.rows += n
        self.tokens += sum(chance**i for i in range(1, n + 1))


def best_length(
    cost: StepCost,
    batch: Batch,
    chances: Sequence[float],
    most: int,
    seconds_each: float = 0.0,
) -> int:
    """The guesses, up to `most`, that each of some requests should add to the batch for the most
    tokens a second.

    `chances`: of each request, that a guess is right if those before it are. `seconds_each`: what
    one more guess of every one of them costs beside its rows.
    """
    best, best_rate = 0, _GAIN * batch.tokens / (cost.seconds(batch.rows) + batch.seconds)
    tokens, powers = batch.tokens, list(chances)
    most = min(most, (cost.reach - batch.rows) // max(1, len(chances)))
    for n in range(1, most + 1):
        likely = sum(powers)
        if likely < _LEAST * len(chances):
            break
        tokens += likely
        seconds = cost.seconds(batch.rows + n * len(chances)) + batch.seconds + n * seconds_each
        if tokens / seconds > best_rate:
            best, best_rate = n, tokens / seconds
        powers = [p * chance for p, chance in zip(powers, chances, strict=True)]
    return best
