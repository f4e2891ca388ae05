"""Prompt-lookup speculation: guess that the text goes on as it did after the same tokens before.

Editing repeats: a rewritten function, a renamed variable, a table's next row. The last tokens are
looked up among all earlier ones, what followed there is the draft, and one batch checks it. The
draft is only a guess about which rows to compute: every token is still sampled from the model's
logits, so a draft changes the speed and nothing else.

Wrong guesses cost time, so a draft is as long as it is likely to pay. How likely each guess is to
be right is counted, also while nothing is drafted: what would have been guessed is held against
what came. What a row costs is measured by `StepCost`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_N = 3  # tokens that must match; pairs match by accident
_LONG_ENOUGH = 32  # longer matches are not told apart
_RECENT = 8  # occurrences looked at
_MEMORY = 0.9  # weight of the past in the counts of right guesses
_FORGET = 500  # steps after which a measured cost is forgotten, so that drafts are tried again
_UNKNOWN = 0.2  # break-even before the costs are known


class Drafter:
    """Guesses for one sequence. Appending and guessing take constant time."""

    def __init__(self, tokens: Sequence[int] = (), *, max_draft: int = 24) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}  # n-gram: where it ends, recent last
        self._max_draft = max_draft
        self._source = 0  # what was guessed last stood here
        self._guess: tuple[int, float] | None = None  # the next token and its group
        # How often guesses were right, by how long the match was: [right, all], as if seen before.
        self._counts = [[0.8, 2.0], [1.4, 2.0], [1.8, 2.0]]
        self._group = 0
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append what came; learn how good the guess about it would have been."""
        have, ends = self._tokens, self._ends
        if self._guess is not None and tokens:
            self._learn(tokens)
        for token in tokens:
            have.append(token)
            if len(have) > _N:
                # The n-gram before this token: so a lookup never finds the end itself.
                key = tuple(have[-_N - 1 : -1])
                places = ends.setdefault(key, [])
                places.append(len(have) - 1)
                if len(places) > _RECENT:
                    del places[0]
        self._match()

    def propose(self, most: int, break_even: float) -> list[int]:
        """Up to `most` tokens likely to come next.

        A guess is worth its row if it is right more often than `break_even`.
        """
        if self._guess is None:
            return []
        right, seen = self._counts[self._group]
        chance = min(right / seen, 0.99)
        if chance <= break_even:
            return []
        # The i-th guess counts only if all before it are right too.
        n = int(math.log(max(break_even, 0.01)) / math.log(chance))
        n = min(n, most, self._max_draft)
        return self._tokens[self._source : self._source + n]

    def _match(self) -> None:
        have = self._tokens
        places = self._ends.get(tuple(have[-_N:]), ()) if len(have) >= _N else ()
        best, self._guess = (0, 0), None
        for place in places:
            n = _N
            while n < min(_LONG_ENOUGH, place) and have[place - 1 - n] == have[-1 - n]:
                n += 1
            if (n, place) > best:
                best = (n, place)
        if best[0]:
            length, self._source = best
            self._group = (length >= 6) + (length >= 12)
            self._guess = (have[self._source], self._group)

    def _learn(self, tokens: Sequence[int]) -> None:
        counts, source = self._counts[self._group], self._source
        for i, token in enumerate(tokens):
            right = source + i < len(self._tokens) and self._tokens[source + i] == token
            counts[0] = counts[0] * _MEMORY + right
            counts[1] = counts[1] * _MEMORY + 1
            if not right:
                break


class StepCost:
    """Fits seconds ≈ a + b · rows to the steps seen, grouped by their size."""

    def __init__(self) -> None:
        self._groups: dict[int, tuple[float, float, int]] = {}  # mean rows, seconds; when last
        self._n_steps = 0

    def observe(self, rows: float, seconds: float) -> None:
        self._n_steps += 1
        group = int(rows).bit_length()
        known = self._groups.get(group)
        if known is not None:
            mean_rows, mean, _ = known
            seconds = min(seconds, 3 * mean)  # a hiccup of the machine says little
            rows, seconds = mean_rows + 0.1 * (rows - mean_rows), mean + 0.1 * (seconds - mean)
        self._groups[group] = rows, seconds, self._n_steps
        old = [g for g, (_, _, when) in self._groups.items() if self._n_steps - when > _FORGET]
        for forgotten in old:
            del self._groups[forgotten]

    def break_even(self, rows: int) -> float:
        """How likely a guess must be right to raise tokens per second, beside `rows` other rows."""
        points = [(n, t) for n, t, _ in self._groups.values()]
        if len(points) < 2:
            return _UNKNOWN
        mean_n = sum(n for n, _ in points) / len(points)
        mean_t = sum(t for _, t in points) / len(points)
        slope = sum((n - mean_n) * (t - mean_t) for n, t in points)
        slope /= sum((n - mean_n) ** 2 for n, _ in points)
        base = max(0.0, mean_t - slope * mean_n)
        return slope * rows / (base + slope * rows) if slope > 0 else 0.0
