"""Nothing half-written under a final name: temporary file in the same folder, fsync, rename."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from dsq.convert.files import human, special_kind
from dsq.errors import DsqError, InputError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there, nor swept away
    fcntl = None  # type: ignore[assignment]


class DiskError(InputError):
    """The disk would not do it, and no other input would help: the same run may succeed later."""


def check_target(path: Path, *, force: bool, n_bytes: int = 0) -> None:
    """Refuse what is sure to fail later: an existing output, a missing or full folder.

    What a run that was killed has left of this output is removed: see `sweep`.
    """
    _refuse_special(path)
    sweep(path)
    if path.exists() and not force:
        raise InputError(f"{path} exists; give another output, or --force to replace it")
    check_space(path, n_bytes)


def _refuse_special(path: Path) -> None:
    """A rename over a device or a pipe takes it away from every other program."""
    try:
        kind = special_kind(path)
    except OSError:  # nothing is there, or a link to nothing; the rest shows when it is written
        return
    if kind is not None:
        raise InputError(
            f"{path} is {kind} and is not replaced, --force or not; a file is to be written: "
            f"give another output"
        )


def check_space(path: Path, n_bytes: int) -> None:
    """Refuse a target in a folder that is missing, read-only or too full for it."""
    folder = path.parent
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; create it or give another output")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder} is read-only; give another output")
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise DiskError(
            f"{folder} has {human(free)} free, but {path.name} needs {human(n_bytes)}; "
            f"free some space or give another output"
        )


@contextmanager
def atomic_files(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield a temporary path for each of `paths`; all are renamed at the end, or all removed.

    They are there, empty and locked, for the caller to write and close. Operating system errors
    become one-line errors that name the target (disk full, read-only, no permission). A link is
    replaced, not what it points to. Raises InputError for a target that is a directory, a device
    or the like.
    """
    for path in paths:
        _refuse_special(path)
    tag = secrets.token_hex(4)
    temporary = [p.with_name(f".{p.name}.{tag}.tmp") for p in paths]
    locks: list[int] = []
    try:
        for path in temporary:
            locks += _made(path, Path.touch)
        yield temporary
        for path in temporary:
            sync(path)
        for path, final in zip(temporary, paths, strict=True):
            path.replace(final)
        for folder in {p.parent for p in paths}:
            sync(folder)
    except OSError as error:
        raise os_error(error, paths[0]) from error
    finally:
        for path in temporary:
            if path.exists():
                path.unlink()
        for lock in locks:
            os.close(lock)


@contextmanager
def atomic_directory(path: Path, *, force: bool, ours: Callable[[str], bool]) -> Iterator[Path]:
    """As `atomic_files`, for a directory: it appears under its name only when complete.

    With `force` a directory that is there is replaced as a whole, but only when `ours` says so of
    every name in it: nothing of the user's is deleted.
    """
    path = path.resolve()
    check_directory(path, force=force, ours=ours)
    tag = secrets.token_hex(4)
    temporary, old = (path.with_name(f".{path.name}.{tag}.{end}") for end in ("tmp", "old"))
    locks: list[int] = []
    try:
        locks += _made(temporary, Path.mkdir)
        yield temporary
        for file in temporary.iterdir():
            sync(file)
        if path.exists():
            locks += _lock(path)
            path.rename(old)  # a kill now, and `sweep` brings it back
            temporary.rename(path)
            old.rename(temporary)  # `sweep` must not bring half of it back
            shutil.rmtree(temporary)
        else:
            temporary.rename(path)
        sync(path.parent)
    except OSError as error:
        raise os_error(error, path) from error
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        if temporary.exists():
            shutil.rmtree(temporary)
        for lock in locks:
            os.close(lock)


def sweep(path: Path) -> None:
    """Remove what runs that were killed have left of the output `path`, beside it.

    An output that was being replaced comes back if nothing has taken its place. What a living run
    works on is locked, and left alone.
    """
    left = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.(tmp|old)")
    with suppress(OSError):  # a folder that is missing or read-only is told when it is written to
        for found in sorted(path.parent.iterdir()):
            for lock in _lock(found) if left.fullmatch(found.name) else []:
                try:
                    if found.suffix == ".old" and not path.exists():
                        found.rename(path)
                    elif found.is_dir():
                        shutil.rmtree(found)
                    else:
                        found.unlink()
                finally:
                    os.close(lock)


def _made(path: Path, make: Callable[[Path], None]) -> list[int]:
    """Make a temporary file or folder and lock it, so that none sweeps it away.

    It stays locked until the one descriptor is closed. None comes where there are no locks.
    """
    while True:
        make(path)
        if fcntl is None:
            return []
        with suppress(FileNotFoundError):  # swept away before it was locked
            lock = os.open(path, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks: then nothing is swept either
                fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_open(path, lock):
                return [lock]
            os.close(lock)


def _lock(path: Path) -> list[int]:
    """As `_made`, for what is there; no descriptor where another run has it."""
    if fcntl is None or path.is_symlink():
        return []
    lock = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_open(path, lock):
            return [lock]
    os.close(lock)
    return []


def _is_open(path: Path, descriptor: int) -> bool:
    """Whether the name still is that of the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def check_directory(path: Path, *, force: bool, ours: Callable[[str], bool]) -> None:
    """Refuse a target directory that may not be replaced. See `atomic_directory` and `sweep`."""
    sweep(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise InputError(f"{path} is a file; a directory is to be written: give another output")
    foreign = sorted(entry.name for entry in path.iterdir() if not ours(entry.name))
    if foreign:
        raise InputError(
            f"{path} holds {foreign[0]}, which is not a model's file; nothing of yours is "
            f"replaced: give another output"
        )
    if not force and any(path.iterdir()):
        raise InputError(f"{path} exists; give another output, or --force to replace it")


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically, replacing what is there."""
    with atomic_files([path]) as (temporary,):
        temporary.write_text(text, encoding="utf-8")


SYNC_FILE_RANGE_WRITE = 2


@cache
def _sync_file_range() -> Any:
    """Linux's call of that name, or None elsewhere."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None) if os.name == "posix" else None
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


def start_writeback(descriptor: int) -> None:
    """Let the disk begin on what was written so far, so that fsync has little left to wait for."""
    function = _sync_file_range()
    if function is not None:
        function(descriptor, 0, 0, SYNC_FILE_RANGE_WRITE)


def sync(path: Path) -> None:
    """What was written to a file, or the names in a folder, survives a power cut."""
    if os.name == "nt":  # Windows flushes files opened for writing, and no folders
        if path.is_dir():
            return
        handle = os.open(path, os.O_RDWR)
    else:
        handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_REMEDY = {
    errno.ENOSPC: "the disk is full; free some space or give another output",
    errno.EDQUOT: "the disk quota is used up; free some space or give another output",
    errno.EROFS: "the file system is read-only; give another output",
    errno.EACCES: "no permission to write there; give another output",
    errno.EPERM: "no permission to write there; give another output",
    errno.ENOENT: "the folder does not exist; create it or give another output",
    errno.EFBIG: "the file system cannot hold a file that large; use --split-max-size",
}


def os_error(error: OSError, path: Path) -> DsqError:
    """An operating system error as one line with the remedy."""
    remedy = _REMEDY.get(error.errno or 0)
    if remedy is None:
        return DsqError(f"{path}: {error.strerror or error}")
    return DiskError(f"{path}: {remedy}")
