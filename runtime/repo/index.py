"""A folder's source files and which of them needs which, read once and kept up to date."""

from __future__ import annotations

import posixpath
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from dsq.errors import InputError
from dsq.runtime.repo.dependencies import PathIndex
from dsq.runtime.repo.files import (
    Repository,
    SkippedFile,
    SourceFile,
    find_repositories,
    read_source,
)
from dsq.runtime.repo.languages import language_of, refine
from dsq.runtime.repo.syntax import imports, require_parsers

MOST_BYTES = 32 << 20  # of source text of one repository: bounds memory, and seconds of parsing
LEAST_SECONDS = 2.0  # between two looks at the folder
SHARE = 20  # looking takes at most one part in so many of the time

_GO_MODULE = re.compile(r"^module\s+(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """One file: `names` is what it imports, `needs` the files of the repository that it means."""

    language: str
    text: str
    names: tuple[str, ...]
    needs: frozenset[str]


@dataclass(frozen=True)
class RepoGraph:
    """A repository at one moment. `skipped`: why files were left out, and how many."""

    name: str
    sources: Mapping[str, Source]
    paths: PathIndex
    skipped: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def needed_by(self) -> Mapping[str, frozenset[str]]:
        found: dict[str, set[str]] = {path: set() for path in self.sources}
        for path, source in self.sources.items():
            for other in source.needs:
                found[other].add(path)
        return {path: frozenset(others) for path, others in found.items()}

    def needs_of(self, path: str, text: str) -> frozenset[str]:
        """What a file at `path` with this text needs, whether or not the repository has it."""
        language = language_of(path)
        if language is None:
            return frozenset()
        language = refine(language, path, text)
        names = imports(language, text)
        return _resolved(self.paths, language, path, names, self.sources)


class RepoIndex:
    """A folder that is looked at again when it may have changed, while the old state is used.

    For several threads. Raises InputError for a folder that cannot be read or holds no source
    files, or without the packages to read one.
    """

    def __init__(self, folder: str | Path, name: str | None = None) -> None:
        require_parsers("leave --repo out")
        self.root = Path(folder).resolve()
        self.name = name or self.root.name or "repository"
        self._folder = folder
        self._lock = threading.Lock()
        self._states: dict[str, tuple[int, int]] = {}  # path → mtime, size
        self._texts: dict[str, tuple[str, str, tuple[str, ...]]] = {}  # language, text, imports
        self._refused: dict[str, str] = {}  # path → why its text is left out
        self._looked, self._took = 0.0, 0.0
        self._graph = self._look()

    def graph(self) -> RepoGraph:
        """The repository as it was a few seconds ago: nobody waits for a folder to be read."""
        age = time.monotonic() - self._looked
        if age > max(LEAST_SECONDS, SHARE * self._took) and self._lock.acquire(blocking=False):
            threading.Thread(target=self._refresh, name="dsq-repo", daemon=True).start()
        return self._graph

    def _refresh(self) -> None:
        """Holds the lock from before it was started."""
        try:
            self._graph = self._look()
        except InputError:  # the folder went away, or is empty for now
            self._looked = time.monotonic()
        finally:
            self._lock.release()

    def _look(self) -> RepoGraph:
        began = time.monotonic()
        found, skipped = find_repositories(self._folder)
        own = next((r for r in found if r.root == self.root), None)
        files = [] if own is None else [f for f in own.files if f.is_code]
        if own is None or not files:
            raise InputError(f"{self._folder}: no source files in this folder; name a repository")
        changed = self._update(own, files, skipped)
        self._looked = time.monotonic()
        self._took = self._looked - began
        return self._built(own.root, skipped) if changed else self._graph

    def _update(self, own: Repository, files: Sequence[SourceFile], skipped: Counter[str]) -> bool:
        """Read what is new or was changed; whether anything was."""
        before = dict(self._states)
        room = MOST_BYTES
        present: dict[str, tuple[int, int]] = {}
        for file in files:
            room -= file.size
            if room < 0:
                skipped[f"beyond {MOST_BYTES >> 20} MiB"] += 1
                continue
            try:
                stat = (own.root / file.path).lstat()
            except OSError:
                continue
            present[file.path] = stat.st_mtime_ns, stat.st_size
        for path in [*self._texts, *self._refused]:
            if present.get(path) != before.get(path):
                self._texts.pop(path, None)
                self._refused.pop(path, None)
        for file in files:
            path = file.path
            if path not in present or path in self._texts or path in self._refused:
                continue
            try:
                text = read_source(own.root / path)
            except SkippedFile as error:
                self._refused[path] = error.reason
                continue
            language = refine(file.language, path, text)
            self._texts[path] = language, text, tuple(imports(language, text))
        skipped.update(self._refused.values())
        self._states = present
        return present != before

    def _built(self, root: Path, skipped: Counter[str]) -> RepoGraph:
        paths = path_index(root, list(self._texts))
        return RepoGraph(
            self.name,
            {
                path: Source(
                    language, text, names, _resolved(paths, language, path, names, self._texts)
                )
                for path, (language, text, names) in self._texts.items()
            },
            paths,
            dict(skipped),
        )


def _resolved(
    paths: PathIndex, language: str, path: str, names: Sequence[str], known: Mapping[str, object]
) -> frozenset[str]:
    found = {other for name in names for other in paths.resolve(language, path, name)}
    return frozenset(other for other in found if other in known and other != path)


def path_index(root: Path, paths: Sequence[str]) -> PathIndex:
    """An index of these files, with the Go modules that their folders declare."""
    modules = {}
    inner = {posixpath.dirname(path) for path in paths if path.endswith(".go")}
    for folder in {outer for start in inner for outer in _up(start)}:
        try:
            text = (root / folder / "go.mod").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        match = _GO_MODULE.search(text)
        if match:
            modules[folder] = match.group(1)
    return PathIndex(paths, modules)


def _up(folder: str) -> Iterator[str]:
    yield folder
    while folder:
        folder = posixpath.dirname(folder)
        yield folder


def inner_path(path: str) -> str:
    """A path inside a repository, as the planner names files: `src/a.py`.

    It is a name and is never opened. Raises InputError for one that leads out of the repository,
    or that could not be written in one line.
    """
    clean = posixpath.normpath(path.replace("\\", "/"))
    outside = clean.startswith(("/", "../")) or clean in (".", "..")
    if outside or not path.isprintable() or len(path) > 1024:
        raise InputError(
            "path: is no file's path inside the repository; give it from the repository's folder, "
            "such as src/main.py"
        )
    return clean
