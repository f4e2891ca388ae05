"""What the user names for a corpus, opened and sorted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dsq.errors import InputError
from dsq.runtime.corpus import code, prose, quality
from dsq.runtime.corpus.sources import Document, Entry, Gate, Group, Unit, in_turn
from dsq.runtime.repo.files import Repository, find_repositories
from dsq.runtime.repo.languages import language_of, path_comment

_DOCS = "README and docs of --repo"


@dataclass(frozen=True)
class Named:
    """`text` is sorted by what is in it: source code, Chinese, or else English."""

    repos: Sequence[Path] = ()
    text: Sequence[Path] = ()
    english: Sequence[Path] = ()
    chinese: Sequence[Path] = ()


def open_repositories(folders: Sequence[Path], gate: Gate) -> dict[str, list[Repository]]:
    """Folder → the repositories in it.

    Raises InputError for a folder without any source file, saying what was left out.
    """
    found = {}
    for folder in folders:
        repositories, skipped = find_repositories(folder)
        gate.dropped.update(skipped)
        if not any(file.is_code for repository in repositories for file in repository.files):
            reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items()))
            left_out = f" (left out: {reasons})" if reasons else ""
            raise InputError(
                f"{folder}: no source files in it{left_out}; "
                "name a folder of code in a language that dsq knows (Python, C, Java, ...)"
            )
        found[str(folder)] = repositories
    return found


def code_groups(found: dict[str, list[Repository]], seed: int) -> list[Group]:
    return [
        Group(name, in_turn([code.units(one, name, seed) for one in repositories]))
        for name, repositories in found.items()
    ]


def tiers(named: Named, gate: Gate, seed: int) -> dict[str, list[list[Group]]]:
    """Part → its tiers: what is named for it first, then the documents of the repositories."""
    found = open_repositories(named.repos, gate)
    docs = [text for some in found.values() for one in some for text in prose.in_repository(one)]
    sorted_: dict[str, list[prose.Prose]] = {"code": [], "english": [], "chinese": []}
    for path, text in zip(named.text, prose.named(named.text), strict=True):
        sorted_[_part_of(path, text)].append(text)
    of_code = [*code_groups(found, seed), Group("--text", _sources(sorted_["code"], seed))]
    parts: dict[str, list[list[Group]]] = {"code": [of_code]}
    for part, paths in (("english", named.english), ("chinese", named.chinese)):
        option = f"--{part}"
        given = prose.units(prose.named(paths), option, seed, None)
        texts = prose.units(sorted_[part], "--text", seed, None)
        parts[part] = [
            [Group(option, given), Group("--text", texts)],
            [Group(_DOCS, prose.units(docs, _DOCS, seed, part))],
        ]
    return parts


def _part_of(path: Path, text: prose.Prose) -> str:
    if language_of(path.name):
        return "code"
    return "chinese" if quality.tongue(prose.read(text.path)) == "chinese" else "english"


def _sources(texts: list[prose.Prose], seed: int) -> Iterator[Unit]:
    """Source files named one by one: taken as they are, each under its name."""
    for unit in prose.units(texts, "--text", seed, None):
        yield Unit(unit.group, partial(_load, unit))


def _load(unit: Unit, gate: Gate) -> list[Document]:
    return [_commented(document) for document in unit.load(gate)]


def _commented(document: Document) -> Document:
    (entry,) = document.entries
    name = Path(entry.path).name
    language = language_of(name) or entry.language
    text = path_comment(language, name) + entry.text
    return Document((Entry(entry.path, language, text, entry.sha256, entry.licence),))
