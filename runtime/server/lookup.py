"""Prompt-lookup speculation: guess that the text goes on as it did after the same tokens before.

Editing repeats: a rewritten function, a renamed variable, a table's next row. The last tokens are
looked up among all earlier ones, what followed there is the draft, and one batch checks it. The
draft is only a guess about which rows to compute: every token is still sampled from the model's
logits, so a draft changes the speed and nothing else. How long a draft pays is for
`dsq.runtime.server.drafting` to say; here is how likely a guess is to be right, which is counted
also while nothing is drafted: what would have been guessed is held against what came.
"""

from __future__ import annotations

from collections.abc import Sequence

_N = 3  # tokens that must match; pairs match by accident
_LONG_ENOUGH = 32  # longer matches are not told apart
_RECENT = 8  # occurrences looked at
_MEMORY = 0.9  # weight of the past in the counts of right guesses


class Drafter:
    """Guesses for one sequence. Appending and guessing take constant time."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}  # n-gram: where it ends, recent last
        self._source: int | None = None  # what is guessed stands from here on
        # How often guesses were right, by how long the match was: [right, all], as if seen before.
        self._counts = [[0.8, 2.0], [1.4, 2.0], [1.8, 2.0]]
        self._group = 0
        self.extend(tokens)

    @property
    def chance(self) -> float:
        """How likely the next guess is right, and each further one if all before it are; 0: there
        is no guess."""
        if self._source is None:
            return 0.0
        right, seen = self._counts[self._group]
        return min(right / seen, 0.99)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append what came; learn how good the guess about it would have been."""
        have, ends = self._tokens, self._ends
        if self._source is not None and tokens:
            self._learn(tokens, self._source)
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

    def propose(self, most: int) -> list[int]:
        """Up to `most` tokens likely to come next. What runs into the end goes round once more."""
        if self._source is None:
            return []
        found = self._tokens[self._source : self._source + most]
        period = len(found)
        while len(found) < most:
            found.append(found[-period])
        return found

    def _match(self) -> None:
        have = self._tokens
        places = self._ends.get(tuple(have[-_N:]), ()) if len(have) >= _N else ()
        best, self._source = (0, 0), None
        for place in places:
            n = _N
            while n < min(_LONG_ENOUGH, place) and have[place - 1 - n] == have[-1 - n]:
                n += 1
            if (n, place) > best:
                best = (n, place)
        if best[0]:
            length, self._source = best
            self._group = (length >= 6) + (length >= 12)

    def _learn(self, tokens: Sequence[int], source: int) -> None:
        counts, known = self._counts[self._group], self._tokens[source : source + len(tokens)]
        for i, token in enumerate(tokens):
            right = token == (known[i] if i < len(known) else tokens[i - len(known)])
            counts[0] = counts[0] * _MEMORY + right
            counts[1] = counts[1] * _MEMORY + 1
            if not right:
                break
