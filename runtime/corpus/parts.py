"""One part of a corpus, filled from its sources until it has its tokens."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from dsq.runtime.corpus.samples import Cutter, Sample
from dsq.runtime.corpus.sources import Entry, Gate, Group, in_turn

# A unit gives at most this share of a part before the next one has its turn: variety, and what is
# read stays near what is needed.
TURN = 1 / 32
# Units read in a row that give nothing, after which a tier is given up.
MOST_FRUITLESS = 2000


@dataclass(frozen=True)
class Part:
    """`tiers`: groups that take turns; a tier is asked when those before it are empty."""

    name: str
    share: float
    tiers: Sequence[Sequence[Group]]


@dataclass
class Used:
    """What a group gave."""

    tokens: int = 0
    entries: dict[str, Entry] = field(default_factory=dict)  # by path
    by_language: Counter[str] = field(default_factory=Counter)  # tokens

    def add(self, sample: Sample) -> None:
        self.tokens += len(sample.ids)
        n_characters = sum(len(entry.text) for entry in sample.entries)
        for entry in sample.entries:
            self.entries[entry.path] = entry
            share = len(entry.text) / max(1, n_characters)
            self.by_language[entry.language] += round(share * len(sample.ids))

    def to_json(self) -> dict[str, Any]:
        """`sha256`: of the sorted sha256 of the files' texts, one a line."""
        files = Counter(entry.language for entry in self.entries.values())
        lines = sorted(entry.sha256 for entry in self.entries.values())
        return {
            "tokens": self.tokens,
            "files": len(self.entries),
            "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
            "languages": {
                name: {"files": n, "tokens": self.by_language[name]}
                for name, n in files.most_common()
            },
            "licences": dict(Counter(e.licence for e in self.entries.values()).most_common()),
        }


class Filler:
    """Draws samples for a part. Can be asked again for more."""

    def __init__(
        self, part: Part, cutter: Cutter, gate: Gate, advance: Callable[[int], None]
    ) -> None:
        self.part = part
        self.samples: list[Sample] = []
        self.n_tokens = 0
        self.used: dict[str, Used] = {}
        self.gave_up: list[str] = []
        self._cutter = cutter
        self._cut = cutter.code if part.name == "code" else cutter.prose
        self._gate = gate
        self._advance = advance
        self._open: deque[tuple[str, Iterator[Sample]]] = deque()
        self._tiers = deque((tier, in_turn([group.units for group in tier])) for tier in part.tiers)

    def fill(self, quota: int, least_turn: int) -> None:
        """Up to `quota` tokens in all; fewer when the sources are empty."""
        turn = max(least_turn, int(quota * TURN))
        while self.n_tokens < quota:
            found = self._next()
            if found is None:
                return
            group, samples = found
            taken = 0
            for sample in samples:
                taken += self._take(group, sample, quota)
                if taken >= turn or self.n_tokens >= quota:
                    self._open.append((group, samples))
                    break

    def _next(self) -> tuple[str, Iterator[Sample]] | None:
        """The next unit's samples; when all units had a turn, what is left of the earlier ones."""
        fruitless = 0
        while self._tiers:
            tier, units = self._tiers[0]
            for unit in units:
                samples = chain.from_iterable(map(self._cut, unit.load(self._gate)))
                first = next(samples, None)
                if first is not None:
                    return unit.group, chain([first], samples)
                fruitless += 1
                if fruitless == MOST_FRUITLESS:
                    names = ", ".join(group.name for group in tier)
                    self.gave_up.append(f"{names}: {fruitless} in a row gave nothing")
                    break
            if self._open:
                return self._open.popleft()
            self._tiers.popleft()
        return None

    def _take(self, group: str, sample: Sample, quota: int) -> int:
        room = quota - self.n_tokens
        if len(sample.ids) > room:
            sample = self._cutter.shorten(sample, room)
        self.samples.append(sample)
        self.n_tokens += len(sample.ids)
        self.used.setdefault(group, Used()).add(sample)
        self._advance(len(sample.ids))
        return len(sample.ids)
