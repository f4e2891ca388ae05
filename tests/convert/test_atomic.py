"""Nothing half-written appears under a final name."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import socket
import stat
from types import SimpleNamespace

import pytest

from dsq.convert.atomic import atomic_directory, atomic_files, check_target, sweep
from dsq.errors import InputError
from tests.killed import Killed, killed_at


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_files_appear_together_when_all_are_written(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    with atomic_files(paths) as temporary:
        for path in temporary:
            path.write_text("x")
        assert not any(p.exists() for p in paths)
    assert names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_and_keeps_the_old_file(tmp_path, error):
    old = tmp_path / "a"
    old.write_text("old")
    with pytest.raises(error), atomic_files([old]) as (temporary,):
        temporary.write_text("half")
        raise error
    assert names(tmp_path) == ["a"]
    assert old.read_text() == "old"


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "no permission"),
    ],
)
def test_operating_system_errors_name_the_target_and_the_remedy(tmp_path, code, remedy):
    target = tmp_path / "model.gguf"
    with pytest.raises(InputError, match=rf"model\.gguf.*{remedy}"), atomic_files([target]):
        raise OSError(code, "boom")
    assert names(tmp_path) == []


def ours(name):
    return name in ("old", "new", "half")


def test_a_directory_replaces_the_old_one_whole(tmp_path):
    out = tmp_path / "hf"
    out.mkdir()
    (out / "old").write_text("")
    with pytest.raises(InputError, match="--force"), atomic_directory(out, force=False, ours=ours):
        pass
    with atomic_directory(out, force=True, ours=ours) as folder:
        (folder / "new").write_text("")
    assert names(out) == ["new"]
    assert names(tmp_path) == ["hf"]


def test_nothing_of_the_users_is_deleted_even_by_force(tmp_path):
    out = tmp_path / "project"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(InputError, match=r"thesis\.tex"),
        atomic_directory(out, force=True, ours=ours),
    ):
        pass
    assert (out / "thesis.tex").read_text() == "years of work"


def test_a_link_to_a_directory_stays_a_link(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    with atomic_directory(link, force=True, ours=ours) as folder:
        (folder / "new").write_text("")
    assert link.is_symlink()
    assert names(real) == ["new"]


def test_a_failed_directory_keeps_the_old_one(tmp_path):
    out = tmp_path / "hf"
    out.mkdir()
    (out / "old").write_text("")
    with pytest.raises(RuntimeError), atomic_directory(out, force=True, ours=ours) as folder:
        (folder / "half").write_text("")
        raise RuntimeError
    assert names(out) == ["old"]
    assert names(tmp_path) == ["hf"]


def replace_files(paths):
    for path in paths:
        check_target(path, force=True)
    with atomic_files(paths) as temporary:
        for path in temporary:
            path.write_text("new")


def test_killed_at_any_operation_and_run_again(tmp_path):
    """No file is ever half there, and nothing is left beside them in the end."""
    for n in itertools.count():
        folder = tmp_path / str(n)
        folder.mkdir()
        paths = [folder / "a", folder / "b"]
        for path in paths:
            path.write_text("old")
        try:
            with killed_at(n):
                replace_files(paths)
        except Killed:
            assert {path.read_text() for path in paths} <= {"old", "new"}
            replace_files(paths)
        else:
            break
        assert names(folder) == ["a", "b"]
        assert {path.read_text() for path in paths} == {"new"}
    assert n > 8


def replace_directory(out):
    with atomic_directory(out, force=True, ours=ours) as folder:
        for name in ("new", "half"):
            (folder / name).write_text("")


def test_a_directory_killed_at_any_operation(tmp_path):
    """Looked at again it is the old one or the new one, whole."""
    for n in itertools.count():
        out = tmp_path / str(n) / "hf"
        out.mkdir(parents=True)
        (out / "old").write_text("")
        try:
            with killed_at(n):
                replace_directory(out)
        except Killed:
            sweep(out)
            assert names(out) in (["old"], ["half", "new"])
            assert names(out.parent) == ["hf"]
            replace_directory(out)
        else:
            break
        assert names(out) == ["half", "new"]
        assert names(out.parent) == ["hf"]
    assert n > 8


def test_what_a_living_run_writes_is_not_swept_away(tmp_path):
    out, directory = tmp_path / "out", tmp_path / "hf"
    of_others = [tmp_path / name for name in (".out.txt.0123abcd.tmp", ".out.tmp", "out.tmp")]
    for path in of_others:
        path.touch()
    with (
        atomic_files([out]) as (file,),
        atomic_directory(directory, force=False, ours=ours) as folder,
    ):
        for path in (out, directory):
            sweep(path)
        assert file.exists()
        assert folder.exists()
        file.write_text("new")
        check_target(out, force=False)
    assert out.read_text() == "new"
    assert all(path.exists() for path in of_others)


def test_targets_are_checked_before_any_work(tmp_path):
    out = tmp_path / "x.gguf"
    with pytest.raises(InputError, match="is not a folder"):
        check_target(tmp_path / "none" / "x.gguf", force=False)
    with pytest.raises(InputError, match=r"GiB free, but x\.gguf needs 1073741824\.0 GiB"):
        check_target(out, force=False, n_bytes=1 << 60)
    with pytest.raises(InputError, match="is a directory"):
        check_target(tmp_path, force=True)
    out.write_text("")
    with pytest.raises(InputError, match="--force"):
        check_target(out, force=False)
    check_target(out, force=True)


def make_special(path, kind):
    """A pipe or the like in a temporary folder: never try this on a real device."""
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))  # its name may have 107 bytes
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a directory"])
@pytest.mark.parametrize("linked", [False, True])
def test_what_is_no_file_is_never_replaced(tmp_path, monkeypatch, kind, linked):
    monkeypatch.chdir(tmp_path)
    special, link = tmp_path / "special", tmp_path / "link"
    make_special(special, kind)
    link.symlink_to(special)
    before = special.stat()
    out = link if linked else special
    with pytest.raises(InputError, match=f"is {kind} and is not replaced"):
        check_target(out, force=True)
    with pytest.raises(InputError, match=f"is {kind}"), atomic_files([out]):
        pytest.fail("began to write")
    assert link.is_symlink()
    assert (special.stat().st_ino, special.stat().st_mode) == (before.st_ino, before.st_mode)
    assert names(tmp_path) == ["link", "special"]


def test_a_link_to_a_file_is_replaced_and_the_file_stays(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    link.symlink_to(real)
    check_target(link, force=True)
    with atomic_files([link]) as (temporary,):
        temporary.write_text("new")
    assert stat.S_ISREG(link.lstat().st_mode)
    assert (link.read_text(), real.read_text()) == ("new", "old")


def test_little_space_is_told_in_a_fitting_unit(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 << 10))
    with pytest.raises(InputError, match=r"has 3\.0 KiB free, but x needs 5\.0 MiB"):
        check_target(tmp_path / "x", force=False, n_bytes=5 << 20)
