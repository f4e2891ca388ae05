"""Repositories as DeepSeek Coder read them: filtered, in order of dependency, joined."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from dsq.runtime.corpus import licences, quality
from dsq.runtime.corpus.sources import Document, Entry, Gate, Unit, digest, seeded
from dsq.runtime.repo.dependencies import PathIndex, dependency_order
from dsq.runtime.repo.files import Repository, SkippedFile, SourceFile, read_source
from dsq.runtime.repo.index import path_index
from dsq.runtime.repo.languages import path_comment, refine
from dsq.runtime.repo.syntax import imports

# A repository up to this size is read and ordered whole, a larger one folder by folder. It is many
# windows long; and a unit gives only its turn, so that more would be read for nothing.
SHARD_BYTES = 256 << 10


def units(repository: Repository, group: str, seed: int) -> Iterator[Unit]:
    """The repository, or its parts in a seeded order."""
    files = [file for file in repository.files if file.is_code]
    index: list[PathIndex] = []  # made when the first unit is read

    def load(shard: Sequence[SourceFile], gate: Gate) -> list[Document]:
        if not index:
            index.append(path_index(repository.root, [file.path for file in files]))
        return _documents(repository, shard, index[0], gate, seed)

    for shard in seeded(shards(files, SHARD_BYTES), seed, lambda shard: shard[0].path):
        yield Unit(group, partial(load, shard))


def shards(files: Sequence[SourceFile], limit: int) -> list[list[SourceFile]]:
    """Parts of at most `limit` bytes, each of neighbouring folders. Sorted paths in and out."""
    return _merge(_split(list(files), 0, limit), limit) if files else []


def _split(files: list[SourceFile], depth: int, limit: int) -> list[list[SourceFile]]:
    if len(files) == 1 or sum(file.size for file in files) <= limit:
        return [files]
    folders: dict[str, list[SourceFile]] = {}
    for file in files:
        parts = file.path.split("/")
        folders.setdefault(parts[depth] if len(parts) > depth + 1 else "", []).append(file)
    parts_out = []
    for name, inside in sorted(folders.items()):
        parts_out += _split(inside, depth + 1, limit) if name else [[file] for file in inside]
    return parts_out


def _merge(parts: list[list[SourceFile]], limit: int) -> list[list[SourceFile]]:
    """Neighbours together while they stay below the limit."""
    merged: list[list[SourceFile]] = []
    size = 0
    for part in parts:
        n_bytes = sum(file.size for file in part)
        if merged and size + n_bytes <= limit:
            merged[-1] += part
            size += n_bytes
        else:
            merged.append(list(part))
            size = n_bytes
    return merged


def _documents(
    repository: Repository, shard: Sequence[SourceFile], index: PathIndex, gate: Gate, seed: int
) -> list[Document]:
    texts: dict[str, tuple[str, str]] = {}  # path → language, text
    for file in shard:
        try:
            text = read_source(repository.root / file.path)
        except SkippedFile as skipped:
            gate.dropped[skipped.reason] += 1
            continue
        language = refine(file.language, file.path, text)
        reason = quality.fault(language, text)
        if reason is None:
            texts[file.path] = language, text
        else:
            gate.dropped[reason] += 1
    name = f"{repository.root}:{shard[0].path}"
    if not texts or gate.is_near_duplicate(name, "\n".join(text for _, text in texts.values())):
        return []
    texts = {path: found for path, found in texts.items() if gate.is_new(digest(found[1]))}
    needs = {
        path: {
            other
            for name in imports(language, text)
            for other in index.resolve(language, path, name)
        }
        for path, (language, text) in texts.items()
    }
    return [
        Document(tuple(_entry(repository, path, *texts[path]) for path in order))
        for order in seeded(dependency_order(needs), seed, lambda order: order[0])
    ]


def _entry(repository: Repository, path: str, language: str, text: str) -> Entry:
    licence = (
        licences.of_source(text) or licences.of_repository(repository.root) or licences.UNKNOWN
    )
    return Entry(
        f"{repository.name}/{path}",
        language,
        path_comment(language, path) + text + ("" if text.endswith("\n") else "\n"),
        digest(text),
        licence,
    )
