"""What the parts of a corpus are drawn from: groups of units, read one after another when asked."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from dsq.runtime.corpus.duplicates import NearDuplicates

_T = TypeVar("_T")


@dataclass(frozen=True)
class Entry:
    """One file, or what was taken out of one, as it goes in."""

    path: str  # unique in its group
    language: str
    text: str  # with the comment that names its path, if it is code
    sha256: str  # of the file's text
    licence: str


@dataclass(frozen=True)
class Document:
    """Files that belong together, in the order in which they are read."""

    entries: tuple[Entry, ...]


@dataclass
class Gate:
    """What was let in so far, and what was turned away and why."""

    dropped: Counter[str] = field(default_factory=Counter)
    near_duplicates: list[tuple[str, str]] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    near: NearDuplicates = field(default_factory=NearDuplicates)

    def is_near_duplicate(self, name: str, text: str) -> bool:
        other = self.near.find_or_add(name, text)
        if other is not None:
            self.near_duplicates.append((name, other))
        return other is not None

    def is_new(self, sha256: str) -> bool:
        """False, and counted, for a file whose very text is in already."""
        if sha256 in self.seen:
            self.dropped["same file again"] += 1
            return False
        self.seen.add(sha256)
        return True


@dataclass(frozen=True)
class Unit:
    """What is read at once: a repository or a part of one, or one text."""

    group: str
    load: Callable[[Gate], list[Document]]


@dataclass(frozen=True)
class Group:
    """A named origin. `units` is consumed once."""

    name: str
    units: Iterator[Unit]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def seeded(items: Iterable[_T], seed: int, key: Callable[[_T], str]) -> list[_T]:
    """In an order that depends on the seed and the keys, and not on the order they came in."""
    return sorted(items, key=lambda item: (digest(f"{seed}/{key(item)}"), key(item)))


def in_turn(streams: Sequence[Iterator[_T]]) -> Iterator[_T]:
    """One of each, round and round, until all have ended."""
    queue = deque(streams)
    while queue:
        stream = queue.popleft()
        for item in stream:
            yield item
            queue.append(stream)
            break
