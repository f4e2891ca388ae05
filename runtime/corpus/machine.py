"""What most machines have: sources and texts that came with the system and its packages.

Never the user's own projects: those go in when they are named.
"""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dsq.runtime.corpus import code, prose
from dsq.runtime.corpus.sources import Group, Unit, in_turn, seeded
from dsq.runtime.repo.files import Repository, find_repositories, list_loose

# `dsq eval` measures on these modules when no text is given, so nothing is calibrated on them.
HELD_OUT = frozenset(("argparse.py", "ast.py", "dataclasses.py", "inspect.py", "pathlib.py"))
# Nor on benchmarks that come as packages.
_NOT = re.compile(r"^(human[-_]?eval|mbpp|evalplus|bigcodebench)", re.IGNORECASE)

_DOC = re.compile(r"^(readme.*|.*\.(md|rst|txt))(\.gz)?$")
_DOC_ZH = re.compile(r"[-_.](zh|cn|chs|chinese)(?![a-z])")


@dataclass(frozen=True)
class Place:
    """Where sources may be. Each folder in one of `folders` is taken for a repository."""

    name: str
    folders: tuple[Path, ...]

    @property
    def found(self) -> list[Path]:
        """Those that are there, each once: a folder may be a link to another."""
        return list(dict.fromkeys(f.resolve() for f in self.folders if f.is_dir()))


@dataclass(frozen=True)
class Places:
    """Where each part of a mix is looked for."""

    code: tuple[Place, ...] = ()
    english: tuple[Place, ...] = ()
    chinese: tuple[Place, ...] = ()

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {"part": part, "place": place.name, "found": [str(folder) for folder in place.found]}
            for part in ("code", "english", "chinese")
            for place in getattr(self, part)
        ]


def places() -> Places:
    """The places of this machine, whether they are there or not."""
    return Places(_code_places(), _english_places(), _chinese_places())


def _code_places() -> tuple[Place, ...]:
    paths = sysconfig.get_paths()
    home, root = Path.home(), Path("/")
    go = (root / "usr/local/go/src", *sorted(root.glob("usr/lib/go*/src")))
    cargo = sorted(home.glob(".cargo/registry/src/*"))
    rust = sorted(home.glob(".rustup/toolchains/*/lib/rustlib/src/rust/library"))
    node = [root / name for name in ("usr/lib/node_modules", "usr/local/lib/node_modules")]
    return (
        Place("Python's standard library", (Path(paths["stdlib"]),)),
        Place("Python packages", (Path(paths["purelib"]), Path(paths["platlib"]))),
        Place("C and C++ headers", (root / "usr/include", root / "usr/local/include")),
        Place("Node modules", (*node, root / "usr/share/nodejs")),
        Place("Go's standard library", go),
        Place("Rust crates", (*cargo, *rust)),
        Place("Perl modules", (*sorted(root.glob("usr/share/perl/5.*")), root / "usr/share/perl5")),
        Place("Ruby's standard library", tuple(sorted(root.glob("usr/lib/ruby/[0-9]*")))),
    )


def code_groups(some: Sequence[Place], seed: int, skipped: Counter[str]) -> list[Group]:
    return [Group(place.name, _place_units(place, seed, skipped)) for place in some if place.found]


def _english_places() -> tuple[Place, ...]:
    paths = sysconfig.get_paths()
    return (
        Place("package descriptions", (Path(paths["purelib"]), Path(paths["platlib"]))),
        Place("documentation", (Path("/usr/share/doc"),)),
        Place("manual pages", (Path("/usr/share/man"),)),
        Place("docstrings", (Path(paths["stdlib"]),)),
    )


def _chinese_places() -> tuple[Place, ...]:
    man = Path("/usr/share/man")
    return (
        Place("Chinese manual pages", (man / "zh_CN", man / "zh_TW")),
        Place("Chinese documentation", (Path("/usr/share/doc"),)),
        Place("Chinese package descriptions", _english_places()[0].folders),
    )


_LISTERS: dict[str, Any] = {
    "package descriptions": prose.package_descriptions,
    "documentation": partial(prose.documentation, name=_DOC),
    "manual pages": prose.manual_pages,
    "docstrings": lambda folder: prose.docstrings(
        path for path in folder.glob("*.py") if path.name not in HELD_OUT
    ),
    "Chinese manual pages": prose.manual_pages,
    "Chinese documentation": partial(prose.documentation, name=_DOC_ZH),
    "Chinese package descriptions": prose.package_descriptions,
}


def prose_groups(some: Sequence[Place], seed: int, tongue: str) -> list[Group]:
    return [Group(place.name, _prose_units(place, seed, tongue)) for place in some if place.found]


def _place_units(place: Place, seed: int, skipped: Counter[str]) -> Iterator[Unit]:
    """One unit of each repository in turn, each listed when its turn has come."""
    roots = [
        path
        for folder in place.found
        for path in folder.iterdir()
        if path.is_dir() and not path.is_symlink() and _is_wanted(path.name)
    ]
    loose = [_loose_units(folder, place.name, seed, skipped) for folder in place.found]
    folders = [
        _folder_units(root, place.name, seed, skipped)
        for root in seeded(roots, seed, lambda path: path.name)
    ]
    yield from in_turn([*loose, *folders])


def _is_wanted(name: str) -> bool:
    return not (
        name.startswith((".", "_"))
        or name.endswith((".dist-info", ".libs"))
        or name in ("site-packages", "dist-packages", "__pycache__")
        or _NOT.match(name)
    )


def _folder_units(root: Path, group: str, seed: int, skipped: Counter[str]) -> Iterator[Unit]:
    found, left_out = find_repositories(root)
    skipped.update(left_out)
    for repository in found:
        yield from code.units(repository, group, seed)


def _loose_units(folder: Path, group: str, seed: int, skipped: Counter[str]) -> Iterator[Unit]:
    listed = list_loose(folder, skipped)
    files = tuple(f for f in listed.files if f.path not in HELD_OUT and _is_wanted(f.path))
    yield from code.units(Repository(listed.name, listed.root, files), group, seed)


def _prose_units(place: Place, seed: int, tongue: str) -> Iterator[Unit]:
    texts = [text for folder in place.found for text in _LISTERS[place.name](folder)]
    yield from prose.units(texts, place.name, seed, tongue)
