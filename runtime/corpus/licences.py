"""The licence of a file or a repository, where it says so itself."""

from __future__ import annotations

import re
import sysconfig
from functools import cache
from pathlib import Path

from dsq.runtime.repo.files import SkippedFile, read_text

UNKNOWN = "unknown"
_SPDX = re.compile(r"SPDX-License-Identifier:\s*([A-Za-z0-9.+-]+(?: (?:AND|OR|WITH) [\w.+-]+)*)")
_FILE = re.compile(r"^(licen[cs]e|copying|unlicense|copyright)\b", re.IGNORECASE)
_FIELD = re.compile(r"^License: *(\S.*)$", re.MULTILINE)  # Debian's copyright files

_EXPRESSION = re.compile(r"^License-Expression: (\S.*)$", re.MULTILINE)
_LICENSE = re.compile(r"^License: (\S.{0,60})$", re.MULTILINE)
_CLASSIFIER = re.compile(r"^Classifier: License :: (?:OSI Approved :: )?(.+)$", re.MULTILINE)

# Licence → phrases that all stand in its text; the first that fits.
_PHRASES = (
    ("Apache-2.0", ("apache license", "version 2.0")),
    ("AGPL-3.0", ("gnu affero general public license", "version 3")),
    ("LGPL-3.0", ("gnu lesser general public license", "version 3, 29 june")),
    ("LGPL-2.1", ("gnu lesser general public license", "version 2.1")),
    ("GPL-3.0", ("gnu general public license", "version 3, 29 june 2007")),
    ("GPL-2.0", ("gnu general public license", "version 2, june 1991")),
    ("MPL-2.0", ("mozilla public license", "2.0")),
    ("PSF-2.0", ("python software foundation license",)),
    ("BSD-3-Clause", ("redistribution and use in source and binary forms", "neither the name")),
    ("BSD-2-Clause", ("redistribution and use in source and binary forms",)),
    ("MIT", ("permission is hereby granted, free of charge",)),
    ("ISC", ("permission to use, copy, modify, and/or distribute",)),
    ("Unlicense", ("free and unencumbered software released into the public domain",)),
    ("CC0-1.0", ("cc0 1.0 universal",)),
)


def of_text(text: str) -> str | None:
    """By an SPDX line, or by phrases of a licence's text."""
    match = _SPDX.search(text)
    if match:
        return match.group(1)
    flat = " ".join(text.lower().split())
    for name, phrases in _PHRASES:
        if all(phrase in flat for phrase in phrases):
            return name
    return None


def of_source(text: str) -> str | None:
    """By the comment at the head of a source file."""
    return of_text(text[:3000])


@cache
def of_folder(folder: Path) -> str | None:
    """By the LICENSE, COPYING or copyright file in a repository's root."""
    try:
        names = sorted(path.name for path in folder.iterdir() if _FILE.match(path.name))
    except OSError:
        return None
    for name in names:
        try:
            text = read_text(folder / name)
        except SkippedFile:
            continue
        field = _FIELD.search(text)
        found = field.group(1).strip()[:60] if field else of_text(text)
        if found:
            return found
    return None


@cache
def of_repository(root: Path) -> str | None:
    """By its own file; or as a part of Python's library, or by an installed package's metadata."""
    found = of_folder(root)
    if found is None and root.parent == Path(sysconfig.get_path("stdlib")).resolve():
        found = of_folder(root.parent)
    if found is None and root.parent.name in ("site-packages", "dist-packages"):
        for metadata in _installed(root.parent).get(root.name, ()):
            found = found or of_metadata(metadata)
    return found


def of_metadata(path: Path) -> str | None:
    """By the header of a Python distribution's METADATA."""
    try:
        header = read_text(path).partition("\n\n")[0]
    except SkippedFile:
        return None
    for field in (_EXPRESSION, _CLASSIFIER, _LICENSE):
        match = field.search(header)
        if match and "copyright" not in match.group(1).lower():  # some put the whole text there
            return match.group(1).strip()
    return None


@cache
def _installed(folder: Path) -> dict[str, list[Path]]:
    """Top-level folder → the METADATA of the distributions that have files in it."""
    from importlib.metadata import distributions

    found: dict[str, list[Path]] = {}
    for distribution in distributions(path=[str(folder)]):
        lines = (distribution.read_text("RECORD") or "").splitlines()
        names = [line.split(",")[0].partition("/") for line in lines]
        metadata = [folder / top / rest for top, _, rest in names if rest == "METADATA"]
        for name in {top for top, slash, _ in names if slash}:
            found.setdefault(name, []).extend(metadata)
    return found
