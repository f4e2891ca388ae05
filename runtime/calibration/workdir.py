"""The folder of an unfinished run: one run at a time, and what is done is not done again."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from dsq.convert.atomic import write_text
from dsq.errors import DsqError, InputError

_LOCK, _STATE = "lock", "state.json"


class WorkDir:
    """`OUT.partial/`, locked while open. `done` counts the steps that survive a kill.

    A folder left by a run of the same `settings` is gone on with; of others, it is refused.
    """

    def __init__(self, out: Path, settings: str) -> None:
        self.path = out.with_name(f"{out.name}.partial")
        self._settings = settings
        self.done = 0
        self._lock = _locked(self.path, out)
        try:
            self.done = self._resume(out)
        except BaseException:
            os.close(self._lock)
            raise

    def _resume(self, out: Path) -> int:
        state = self.path / _STATE
        if not state.exists():  # nothing was finished: begin with an empty folder
            for path in self.path.iterdir():
                if path.name != _LOCK:
                    path.unlink()
            return 0
        found = json.loads(state.read_text())
        if found["settings"] != self._settings:
            raise InputError(
                f"{self.path} holds an unfinished run with other settings (model, text, threads "
                f"or options); repeat those to finish it, delete the folder, or give another output"
            )
        return int(found["done"])

    def save(self, done: int) -> None:
        """From now on a killed run goes on after `done` steps."""
        write_text(
            self.path / _STATE, json.dumps({"done": done, "settings": self._settings}, indent=1)
        )
        self.done = done

    def finish(self, file: str, out: Path) -> None:
        """Give `file` its final name, and remove the folder."""
        (self.path / file).replace(out)
        shutil.rmtree(self.path)

    def __enter__(self) -> WorkDir:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and (self.done == 0 or issubclass(kind, DsqError)):
            # Nothing in it is worth keeping: nothing is finished, or it would fail again.
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


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
