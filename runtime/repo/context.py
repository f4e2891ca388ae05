"""Which files of a repository stand before the one that is written, in how many tokens.

DeepSeek Coder's format: files in order of dependency, each under a comment with its path, the file
to complete last. What is nearest by imports goes in first, of equals what most files import.
Pure: names, texts and a tokenizer in, tokens out.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dsq.runtime.line_cut import keep_start
from dsq.runtime.repo.dependencies import dependency_order
from dsq.runtime.repo.index import RepoGraph
from dsq.runtime.repo.languages import language_of, path_comment
from dsq.runtime.repo.syntax import PARSED
from dsq.tokenizer_port.tokenizer import Tokenizer

IMPORTED, IMPORTING = 1, 3  # steps: to what a file imports, to what imports it
FARTHEST = 3  # steps; beyond is what shares a common helper, and most of the repository does
LEAST_PART = 32  # tokens; a shorter beginning of a file says nothing
MOST_MISSES = 16  # files of a ring that are too long before the rest is not tried
MOST_NAMED = 20  # paths in a report
CHARACTERS = 64  # of one token at most, for our purpose: a longer text is cut before it is encoded


@dataclass(frozen=True)
class Part:
    """One file as it stands in the prompt; of a file that was cut, its beginning."""

    path: str
    ids: tuple[int, ...]
    cut: bool = False


@dataclass(frozen=True)
class Context:
    """`parts` in the prompt's order; `left_out` are the near files for which there was no room."""

    name: str
    parts: tuple[Part, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(i for part in self.parts for i in part.ids)

    @property
    def n_tokens(self) -> int:
        return sum(len(part.ids) for part in self.parts)

    def report(self) -> dict[str, Any]:
        """What went in and what did not, for a response's `dsq` field."""
        return {
            "name": self.name,
            "tokens": self.n_tokens,
            "files": [part.path for part in self.parts],
            "cut_files": [part.path for part in self.parts if part.cut],
            "dropped_files": list(self.left_out[:MOST_NAMED]),
            "n_dropped_files": len(self.left_out),
        }


def summary(report: Mapping[str, Any]) -> str:
    """A report of `Context` in a line for people."""
    files, cut = report["files"], report["cut_files"]
    if not files:
        return f"nothing of the repository {report['name']} is in the prompt"
    shown = ", ".join(f"{path} (its beginning)" if path in cut else path for path in files[:8])
    more = f" and {len(files) - 8} more" if len(files) > 8 else ""
    left = report["n_dropped_files"]
    rest = f"; no room for {left} more" if left else ""
    return f"{report['tokens']:,} tokens of the repository {report['name']}: {shown}{more}{rest}"


def heading(path: str) -> str:
    """The comment line with a file's path, in the comment style of its language."""
    return path_comment(language_of(path) or "Python", " ".join(path.split()))


def rings(graph: RepoGraph, path: str | None, needs: frozenset[str]) -> list[list[str]]:
    """The other files, nearest first; in a ring those that most files import first.

    `needs` is what the file at `path` imports now. Without a path all source files are one ring.
    """
    if path is None:
        known = [p for p, source in graph.sources.items() if source.language in PARSED]
        return [sorted(known, key=lambda p: (-len(graph.needed_by[p]), p))] if known else []
    distance = _distances(graph, path, needs)
    found: dict[int, list[str]] = {}
    for other, steps in distance.items():
        if other != path:
            found.setdefault(steps, []).append(other)

    def rank(other: str) -> tuple[int, int, str]:
        return -len(graph.needed_by[other]), _apart(path, other), other

    return [sorted(found[steps], key=rank) for steps in sorted(found)]


def _distances(graph: RepoGraph, path: str, needs: frozenset[str]) -> dict[str, int]:
    """Steps from `path` along imports, and against them at a higher price; at most FARTHEST."""
    best = {path: 0}
    heap = [(0, path)]
    while heap:
        steps, here = heapq.heappop(heap)
        if steps > best[here]:
            continue
        source = graph.sources.get(here)
        forward = needs if here == path else source.needs if source else frozenset()
        for price, others in (
            (IMPORTED, forward),
            (IMPORTING, graph.needed_by.get(here, frozenset())),
        ):
            for other in others:
                there = steps + price
                if there <= FARTHEST and there < best.get(other, FARTHEST + 1):
                    best[other] = there
                    heapq.heappush(heap, (there, other))
    return best


def _apart(one: str, other: str) -> int:
    """Folders to go up and down from one file to the other."""
    a, b = one.split("/")[:-1], other.split("/")[:-1]
    common = 0
    while common < min(len(a), len(b)) and a[common] == b[common]:
        common += 1
    return len(a) + len(b) - 2 * common


class ContextPlanner:
    """Plans for one tokenizer. It remembers the tokens of the files that it met last."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._encoded = lru_cache(maxsize=256)(self._encode)

    def plan(
        self, graph: RepoGraph, room: int, *, path: str | None = None, text: str | None = None
    ) -> Context:
        """At most `room` tokens of what stands before the file at `path`, whose text is `text`.

        Without a text that file goes in, too, as it is on disk; without a path all files may.
        Ring by ring: whole files while they fit; then the beginning, up to a line's end, of the
        first of the ring that did not, and no farther.
        """
        own = graph.sources.get(path) if path is not None and text is None else None
        needs: frozenset[str] = frozenset()
        if path is not None:
            needs = graph.needs_of(path, text or "") if own is None else own.needs
        near = ([[path]] if own is not None and path else []) + rings(graph, path, needs)
        parts: dict[str, Part] = {}
        for ring in near:
            too_long = []
            for other in ring:
                part = self._whole(graph, other, room)
                if part is None:
                    too_long.append(other)
                else:
                    parts[other] = part
                    room -= len(part.ids)
                if room < LEAST_PART or len(too_long) > MOST_MISSES:
                    break
            if too_long and room >= LEAST_PART:
                part = self._beginning(graph, too_long[0], room)
                if part is not None:
                    parts[part.path] = part
            if too_long or room < LEAST_PART:
                break
        left_out = tuple(other for ring in near for other in ring if other not in parts)
        order = _order(graph, path, needs, parts)
        return Context(graph.name, tuple(parts[other] for other in order), left_out)

    def _whole(self, graph: RepoGraph, path: str, room: int) -> Part | None:
        text = _written(graph, path)
        if len(text) > room * CHARACTERS:
            return None
        ids = self._encoded(text)
        return Part(path, ids) if len(ids) <= room else None

    def _beginning(self, graph: RepoGraph, path: str, room: int) -> Part | None:
        text = _written(graph, path)[: room * CHARACTERS]
        ids = keep_start(self._tokenizer, text, self._encoded(text), room)
        return Part(path, tuple(ids), cut=True) if len(ids) >= LEAST_PART // 2 else None

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_bos=False))


def _written(graph: RepoGraph, path: str) -> str:
    return heading(path) + graph.sources[path].text.rstrip() + "\n\n"


def _order(
    graph: RepoGraph, path: str | None, needs: frozenset[str], chosen: Mapping[str, object]
) -> Sequence[str]:
    """The chosen files, each after those that it needs."""
    edges = {other: graph.sources[other].needs for other in sorted(chosen)}
    if path is not None:
        edges[path] = needs
    return [o for part in dependency_order(edges) for o in part if o in chosen]
