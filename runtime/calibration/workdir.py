"""The folder of an unfinished run: one run at a time, and what is done is not done again."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dsq.convert.atomic import DiskError, os_error, sync, write_text
from dsq.errors import DsqError, InputError

_LOCK, _STATE = "lock", "state.json"


class WorkDir(AbstractContextManager["WorkDir"]):
    """`OUT.partial/`, locked while open. `done` counts the steps that survive a kill.

    A folder left by a run of the same `settings` is gone on with; of others, it is refused. Names
    with a dot in front are temporary and lost; a step may have a WorkDir of its own in here.
    Operating system errors become one-line errors that name `out`, as in `atomic_files`.
    """

    def __init__(self, out: Path, settings: str) -> None:
        self.out, self.path = out, _folder(out)
        self.done = 0
        self._settings = settings
        self._results: dict[str, Any] = {}
        self._named: dict[str, Any] = {}  # see `finish_all`
        self._begun = False  # something is worth keeping
        self._went_on = False  # it is a run before this one that began it
        self._taken: dict[str, Path] = {}  # what that run had named already
        self._refuse_foreign()
        try:
            self._lock = _locked(self.path, out)
            try:
                self._resume()
            except BaseException:
                os.close(self._lock)
                raise
        except OSError as error:
            raise os_error(error, out) from error

    @staticmethod
    def owns(out: Path) -> bool:
        """Whether a run that was killed had given `out` its name, and was to clean up after it.

        Such an output is in nobody's way: the same run takes it back and finishes it again.
        """
        folder = _folder(out)
        try:
            named = json.loads((folder / _STATE).read_text())["named"]
        except (OSError, ValueError, KeyError):
            return False
        places = [(folder.parent / out, mark) for out, mark in named.values()]
        ours = all(not path.exists() or _mark(path) == mark for path, mark in places)
        return bool(named) and ours and _in_reach(folder, named)

    @staticmethod
    def is_left(out: Path) -> bool:
        """Whether an unfinished run for `out` can be gone on with."""
        return (_folder(out) / _STATE).exists()

    def _refuse_foreign(self) -> None:
        if self.path.is_dir() and not (self.path / _LOCK).exists():
            for found in self.path.iterdir():
                raise InputError(
                    f"{self.path} holds {found.name}, and is no folder of dsq's: nothing of yours "
                    "is deleted; move it away, or give another output"
                )

    def _resume(self) -> None:
        state = self.path / _STATE
        self._begun = state.exists()
        if self._begun:
            found = json.loads(state.read_text())
            if found["settings"] != self._settings:
                raise InputError(
                    f"{self.path} holds an unfinished run with other settings (model, text, "
                    "threads or options); repeat those to finish it, delete the folder, or give "
                    "another output"
                )
            self._begun = _in_reach(self.path, found.get("named", {}))
        if self._begun:
            self._went_on = True
            self.done, self._results = int(found["done"]), found["results"]
            for name, (out, _) in found.get("named", {}).items():
                if not (self.path / name).exists():
                    self._taken[name] = self.path.parent / out
                    self._taken[name].replace(self.path / name)
        else:
            state.unlink(missing_ok=True)  # first: it must not outlive the files it speaks of
        for path in self.path.iterdir():
            if path.name.startswith(".") or not (self._begun or path.name == _LOCK):
                _remove(path)

    def save(self, done: int) -> None:
        """From now on a killed run goes on after `done` steps. Their files are the caller's to sync
        (a power cut)."""
        state = {
            "done": done,
            "settings": self._settings,
            "results": self._results,
            "named": self._named,
        }
        write_text(self.path / _STATE, json.dumps(state, indent=1))
        self.done, self._begun = done, True

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of `make`, which is JSON: run now, or by the run that this one goes on with.

        A step of that name is then done, with the files that `make` left in the folder.
        """
        if name not in self._results:
            if not self._begun:
                self.save(self.done)  # so that what `make` half does is kept
            self._results[name] = json.loads(json.dumps(make()))
            self.save(self.done + 1)
        return self._results[name]

    def leave(self) -> None:
        """The end of a run that was to show something only: a folder that it made is removed, and
        what another run is to go on with is as it was."""
        if not self._went_on:
            self._clear()
        for name, out in self._taken.items():
            (self.path / name).replace(out)

    def finish(self, file: str, out: Path, *, force: bool = True) -> None:
        """Give `file` its final name, and remove the folder."""
        self.finish_all({file: out}, force=force)

    def finish_all(self, files: Mapping[str, Path], *, force: bool = True) -> None:
        """Give files (or folders) in here their final names, and remove this folder.

        After a kill on the way the run is begun anew only when all names were given: until then
        the state stays, and tells which files a run that goes on has to take back. Without `force`
        a file that came while we worked is refused; what is done is kept.
        """
        for out in files.values():
            if not force and out.exists():
                raise DiskError(
                    f"{out} came while this run was at work, and is not replaced; what is done is "
                    "kept: move it away and repeat the command, or add --force"
                )
        self._named = {
            name: [os.path.relpath(out, self.path.parent), _mark(self.path / name)]
            for name, out in files.items()
        }
        self.save(self.done)
        for name, out in files.items():
            (self.path / name).replace(out)
        for folder in {out.parent for out in files.values()}:
            sync(folder)
        self._clear()

    def _clear(self) -> None:
        """Remove the folder: the state first, which must not outlive the files that it speaks of;
        the lock last, which tells that the rest is ours."""
        (self.path / _STATE).unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path.name != _LOCK:
                _remove(path)
        (self.path / _LOCK).unlink()
        self.path.rmdir()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is not None and (_fails_again(error) or not self._begun):
                with suppress(OSError):
                    self._clear()
        finally:
            os.close(self._lock)
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):  # of a report
            raise os_error(error, self.out) from error


def _folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def _mark(path: Path) -> list[int]:
    """Tells whether a file or folder is still the same one under another name."""
    state = path.stat(follow_symlinks=False)
    return [state.st_ino, state.st_size, state.st_mtime_ns]


def _in_reach(folder: Path, named: Mapping[str, Any]) -> bool:
    """Whether each file that a run has begun to name is in its folder, or is what has the name."""
    try:
        return all(
            (folder / name).exists() or _mark(folder.parent / out) == mark
            for name, (out, mark) in named.items()
        )
    except FileNotFoundError:
        return False


def _fails_again(error: BaseException) -> bool:
    """Whether the same run would end the same way: not when the disk was at fault."""
    of_disk = isinstance(error, DiskError) or isinstance(error.__cause__, OSError)
    return isinstance(error, DsqError) and not of_disk


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def settings_hash(*parts: object) -> str:
    """The same for the same parts: arrays by their bytes, all else by its `repr`."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode() + part.tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


def _locked(folder: Path, out: Path) -> int:
    """The descriptor of the folder's lock file. Raises InputError when another run has it."""
    while True:
        folder.mkdir(exist_ok=True)
        try:
            file = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # the other run has just finished, and removed the folder
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise InputError(
                f"{out} is being written by another run (it holds {folder / _LOCK}); wait for it, "
                "or give another output"
            ) from None
        with suppress(FileNotFoundError):
            if (folder / _LOCK).stat().st_ino == os.fstat(file).st_ino:
                return file
        os.close(file)  # it was the lock of a folder that is gone
