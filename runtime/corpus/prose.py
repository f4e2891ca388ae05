"""Texts for people: README files, documentation, manual pages, package descriptions, docstrings."""

from __future__ import annotations

import ast
import gzip
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dsq.errors import InputError
from dsq.runtime.corpus import licences, quality, troff
from dsq.runtime.corpus.sources import Document, Entry, Gate, Unit, digest, seeded
from dsq.runtime.repo.files import (
    MOST_BYTES,
    Repository,
    SkippedFile,
    check_text,
    read_text,
)
from dsq.runtime.repo.languages import prose_of
from dsq.runtime.repo.syntax import python_tree

_LEAST = 200  # characters; less says too little


@dataclass(frozen=True)
class Prose:
    """A file, and how its text is taken out of it."""

    path: Path
    kind: str  # as a language: "Markdown", "manual page"
    extract: Callable[[str], str]
    licence: Callable[[Path], str | None]


def units(texts: Iterable[Prose], group: str, seed: int, tongue: str | None) -> Iterator[Unit]:
    """One unit a text, in a seeded order. `tongue`: leave out what is not written in it."""
    for prose in seeded(texts, seed, lambda prose: str(prose.path)):
        yield Unit(group, partial(_documents, prose, tongue))


def in_repository(repository: Repository) -> list[Prose]:
    """Its README files and documentation."""
    root = repository.root
    return [
        Prose(root / file.path, file.language, _same, lambda _: licences.of_folder(root))
        for file in repository.files
        if not file.is_code
    ]


def named(paths: Iterable[Path]) -> list[Prose]:
    """Files that the user names, `.gz` too. Raises InputError for what cannot be read as text."""
    found = []
    for path in paths:
        try:
            read(path.resolve())
        except SkippedFile as skipped:
            if skipped.reason == "too large":
                remedy = f"split it into files of at most {MOST_BYTES} bytes"
            else:
                remedy = "give UTF-8 text"
            raise InputError(f"{path}: {skipped.reason}; {remedy}") from skipped
        found.append(Prose(path.resolve(), prose_of(path.name) or "Text", _same, _beside))
    return found


def package_descriptions(site_packages: Path) -> list[Prose]:
    """The long description, mostly the README, of each installed Python package."""
    return [
        Prose(
            path,
            "package description",
            lambda text: text.partition("\n\n")[2],
            licences.of_metadata,
        )
        for path in site_packages.glob("*.dist-info/METADATA")
    ]


def documentation(folder: Path, name: re.Pattern[str]) -> list[Prose]:
    """Files in /usr/share/doc whose names match; links are not followed."""
    found = []

    def licence(path: Path) -> str | None:
        return licences.of_folder(folder / path.relative_to(folder).parts[0])

    for package in _folders(folder):
        for path in package.rglob("*"):
            if name.search(path.name.lower()) and not path.is_symlink() and path.is_file():
                kind = prose_of(path.name.removesuffix(".gz")) or "Text"
                found.append(Prose(path, kind, _same, licence))
    return found


def manual_pages(folder: Path) -> list[Prose]:
    """Pages of a folder like /usr/share/man or /usr/share/man/zh_CN."""
    return [
        Prose(path, "manual page", troff.plain, lambda _: None)
        for section in folder.glob("man[1-8]")
        for path in section.iterdir()
        if not path.is_symlink()
    ]


def docstrings(files: Iterable[Path]) -> list[Prose]:
    """The documentation inside Python modules."""
    return [Prose(path, "docstrings", _docstrings, lambda _: "PSF-2.0") for path in files]


def _documents(prose: Prose, tongue: str | None, gate: Gate) -> list[Document]:
    try:
        raw = read(prose.path)
    except SkippedFile as skipped:
        gate.dropped[skipped.reason] += 1
        return []
    text = prose.extract(raw)
    reason = None
    if tongue is not None:  # else the user named it, and it is taken as it is
        if len(text) < _LEAST:
            reason = "too short"
        elif quality.tongue(text) != tongue:
            reason = f"not {tongue.capitalize()}"
    if reason is not None:
        gate.dropped[reason] += 1
        return []
    sha256 = digest(raw)
    if not gate.is_new(sha256) or gate.is_near_duplicate(str(prose.path), text):
        return []
    licence = prose.licence(prose.path) or licences.UNKNOWN
    return [Document((Entry(str(prose.path), prose.kind, text, sha256, licence),))]


def read(path: Path) -> str:
    """A text, `.gz` too. Raises SkippedFile as `repo_files.read_text` does."""
    if path.suffix != ".gz":
        return read_text(path)
    try:
        with gzip.open(path) as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise SkippedFile("unreadable") from error
    if len(data) > MOST_BYTES:
        raise SkippedFile("too large")
    return check_text(data)


def _same(text: str) -> str:
    return text


def _beside(path: Path) -> str | None:
    return licences.of_folder(path.parent)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())


def _docstrings(source: str) -> str:
    tree = python_tree(source)
    if tree is None:
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(text for text in found if text and len(text) > 80) + "\n"
