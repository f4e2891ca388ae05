"""The repositories that requests may name: those that the operator gave, and no other folder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from dsq.errors import InputError
from dsq.runtime.repo.context import Context, ContextPlanner
from dsq.runtime.repo.index import RepoIndex, inner_path
from dsq.runtime.server.bodies import SamplingBody
from dsq.runtime.server.infill import ALONE, Extra, Surroundings
from dsq.tokenizer_port.tokenizer import Tokenizer


class Repositories:
    """Name → folder, read when the server starts and looked at again every few seconds."""

    def __init__(self, folders: Mapping[str, Path] | None = None) -> None:
        """Raises InputError for a folder that cannot be read or holds no source files."""
        self._indexes = {name: RepoIndex(path, name) for name, path in (folders or {}).items()}
        self._planner = lru_cache(maxsize=4)(ContextPlanner)  # one for each model's tokenizer

    def about(self) -> str:
        """For the line that the server says when it starts; empty without any."""
        found = [f"{n} ({len(i.graph().sources):,} files)" for n, i in self._indexes.items()]
        return f", repository {', '.join(found)}" if found else ""

    def around(
        self,
        body: SamplingBody,
        tokenizer: Tokenizer,
        text: str | None,
        extra: tuple[Extra, ...] = (),
    ) -> Surroundings:
        """What a request's `repo`, `path` and extra files put before the file with this text.

        A `text` of None: the file at `path` is one of the files, as it is on disk.
        Raises InputError for a repository that is not offered, or a path that leads out of one.
        """
        path = inner_path(body.path) if body.path else None
        index = self._index(body.repo)
        if index is None:
            return Surroundings(path, extra) if path or extra else ALONE
        graph, planner = index.graph(), self._planner(tokenizer)

        def planned(room: int) -> Context:
            return planner.plan(graph, room, path=path, text=text)

        return Surroundings(path, extra, planned)

    def _index(self, asked: str | bool | None) -> RepoIndex | None:
        if asked is None or asked is False:
            return None
        if not self._indexes:
            raise InputError("repo: this server has no repositories; start it with --repo DIR")
        if asked is True and len(self._indexes) == 1:
            return next(iter(self._indexes.values()))
        found = self._indexes.get(asked) if isinstance(asked, str) else None
        if found is None:
            names = ", ".join(self._indexes)
            what = f"no repository {asked[:100]!r} here" if isinstance(asked, str) else "which one"
            raise InputError(f"repo: {what}; repositories: {names}")
        return found


def named_folders(given: list[str]) -> dict[str, Path]:
    """`--repo [NAME=]DIR` … as name → folder. Raises InputError for two of one name."""
    folders: dict[str, Path] = {}
    for text in given:
        name, equals, folder = ("", "", "") if Path(text).is_dir() else text.partition("=")
        path = Path(folder if equals else text)
        name = name if equals else path.resolve().name
        if not name or not (folder if equals else text):
            raise InputError(f"--repo {text}: give DIR, or NAME=DIR")
        if name in folders:
            raise InputError(f"--repo {text}: {name} is named already; give NAME=DIR")
        folders[name] = path
    return folders
