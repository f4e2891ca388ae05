"""The folder of an unfinished run: what is kept, what is swept away, whose it is."""

from __future__ import annotations

import errno
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from dsq.convert.atomic import DiskError, check_target, os_error
from dsq.errors import InputError
from dsq.runtime.calibration.workdir import WorkDir, settings_hash
from tests.killed import Killed, killed_at
from tests.runtime.dying import die


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_step_is_done_once(tmp_path: Path) -> None:
    out, calls = tmp_path / "out", []

    def make() -> dict[str, object]:
        calls.append(1)
        return {"kld": 0.1 + 0.2, "types": ("q4_0",)}

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), WorkDir(out, "s") as work:
            assert work.once("first", make) == {"kld": 0.1 + 0.2, "types": ["q4_0"]}
            assert work.done == 1
            raise KeyboardInterrupt
    assert len(calls) == 1
    with WorkDir(out, "s") as work:
        work.once("second", lambda: (work.path / "file").write_text("data"))
        assert work.done == 2
        work.finish("file", out)
    assert names(tmp_path) == {"out"}
    assert out.read_text() == "data"


_CHILD = """
from pathlib import Path
from dsq.runtime.calibration.workdir import WorkDir
def outer():
    with WorkDir(work.path / "inner", "i") as inner:
        (inner.path / "one").write_text("1")
        inner.save(1)
        (inner.path / ".two.tmp").write_text("half")
        print(Path().absolute())
with WorkDir(Path(out), "o") as work:
    work.once("outer", outer)
"""


def test_killed_in_a_step_that_has_steps_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "out"
    die(_CHILD, "pathlib:Path.absolute", 1, out=out)
    with WorkDir(out, "o") as work:
        assert work.done == 0
        with WorkDir(work.path / "inner", "i") as inner:
            assert inner.done == 1
            assert names(inner.path) == {"lock", "state.json", "one"}
            (inner.path / "one").write_text("1")
            inner.finish("one", work.path / "inner")
        work.finish("inner", out)
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (InputError("weights are NaN or Inf"), False),  # it would fail again
        (os_error(OSError(errno.ENOSPC, "full"), Path("out")), True),
        (OSError(errno.ENOSPC, "full"), True),
        (KeyboardInterrupt(), True),
    ],
    ids=["input", "disk", "bare", "interrupt"],
)
def test_what_may_succeed_later_is_kept(tmp_path: Path, error: Exception, kept: bool) -> None:
    raised = DiskError if isinstance(error, OSError) else type(error)
    with pytest.raises(raised), WorkDir(tmp_path / "out", "s") as work:
        work.save(1)
        raise error
    assert names(tmp_path) == ({"out.partial"} if kept else set())


def test_nothing_done_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), WorkDir(tmp_path / "out", "s") as work:
        (work.path / "half").write_text("")
        raise KeyboardInterrupt
    assert not names(tmp_path)


def test_a_folder_of_the_users_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "out.partial"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"holds thesis\.tex, and is no folder of dsq's"):
        WorkDir(tmp_path / "out", "s")
    assert names(mine) == {"thesis.tex"}


_FINISHES = """
from pathlib import Path
from dsq.runtime.calibration.workdir import WorkDir
with WorkDir(Path(out), "settings") as work:
    for name in ("file", "rest"):
        (work.path / name).write_text("data")
    work.save(1)
    work.finish("file", Path(out))
"""


def test_killed_while_it_cleans_up(tmp_path: Path) -> None:
    """The file has its name; the rest of the folder is known to be ours."""
    out = tmp_path / "out"
    die(_FINISHES, "dsq.runtime.calibration.workdir:_remove", 1, out=out)
    assert out.read_text() == "data"
    with WorkDir(out, "other settings") as work:
        assert (work.done, names(work.path)) == (0, {"lock"})


def write_two(out: Path, calls: list[str], *, force: bool = False) -> None:
    """A long run with a costly step and two outputs."""
    outs = {"first": out, "second": out.with_name("beside")}
    force = force or WorkDir.owns(out)
    for path in outs.values():
        check_target(path, force=force)
    with WorkDir(out, "settings") as work:
        work.once("costly", lambda: calls.append("costly"))
        calls.append("kept")
        for name in outs:
            (work.path / name).write_text(f"new {name}")
        work.finish_all(outs)


def kept(out: Path) -> bool:
    """Whether the costly step's result is there for the next run."""
    state = out.with_name("out.partial") / "state.json"
    return state.exists() and "costly" in json.loads(state.read_text())["results"]


def contents(out: Path) -> list[str | None]:
    paths = [out, out.with_name("beside")]
    return [path.read_text() if path.exists() else None for path in paths]


NEW = ["new first", "new second"]


@pytest.mark.parametrize("force", [False, True])
def test_killed_at_any_operation_and_run_again(tmp_path: Path, force: bool) -> None:
    """What was done is lost only when all outputs have their names; none is ever half there."""
    for n in itertools.count():
        out, calls = tmp_path / str(n) / "out", []
        out.parent.mkdir()
        if force:
            out.write_text("old")
            out.with_name("beside").write_text("old")
        try:
            with killed_at(n):
                write_two(out, calls, force=force)
        except Killed:
            pass
        else:
            break
        before = contents(out)
        assert all(a in ("old" if force else None, b) for a, b in zip(before, NEW, strict=True))
        was_kept = kept(out)
        assert was_kept or "kept" not in calls or before == NEW
        if before == NEW and not was_kept and not force:
            with pytest.raises(InputError, match="exists; give another output, or --force"):
                write_two(out, calls)
        else:
            write_two(out, calls, force=force)
            assert names(out.parent) == {"out", "beside"}
        assert contents(out) == NEW
        if was_kept:
            assert calls.count("costly") == 1
    assert n > 20


def test_killed_at_any_operation_of_the_second_run(tmp_path: Path) -> None:
    """The first had just named one of two outputs, which the second takes back."""
    for n in itertools.count():
        out, calls = tmp_path / str(n) / "out", []
        out.parent.mkdir()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(WorkDir, "_clear", interrupted)
            write_two(out, calls)
        assert contents(out) == NEW
        try:
            with killed_at(n):
                write_two(out, calls)
        except Killed:
            if kept(out):
                write_two(out, calls)
        else:
            break
        assert contents(out) == NEW
        assert calls.count("costly") == 1
    assert n > 10


def interrupted(work: WorkDir) -> None:
    raise KeyboardInterrupt


def test_an_output_that_the_user_has_replaced_is_not_taken_back(tmp_path: Path) -> None:
    out, calls = tmp_path / "out", []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(WorkDir, "_clear", interrupted)
        write_two(out, calls)
    out.unlink()
    out.write_text("mine")
    with pytest.raises(InputError, match="exists; give another output, or --force"):
        write_two(out, calls)
    assert out.read_text() == "mine"
    write_two(out, calls, force=True)  # from the beginning
    assert (contents(out), calls.count("costly")) == (NEW, 2)
    assert names(tmp_path) == {"out", "beside"}


def test_settings_differ_by_any_part() -> None:
    ids = np.arange(6, dtype=np.int32)
    parts = [(1, ids), (2, ids), (1, ids + 1), (1, ids.reshape(2, 3)), (1, ids.view(np.float32))]
    assert len({settings_hash(*some) for some in parts}) == len(parts)
    assert settings_hash(1, ids) == settings_hash(1, ids.copy())


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(DiskError, match="came while this run was at work"),
        WorkDir(out, "s") as work,
    ):
        work.once("first", lambda: (work.path / "file").write_text("ours"))
        out.write_text("theirs")
        work.finish("file", out, force=False)
    assert out.read_text() == "theirs"
    with WorkDir(out, "s") as work:
        assert work.done == 1
        work.finish("file", out, force=True)
    assert out.read_text() == "ours"


def test_a_run_that_only_shows_leaves_what_another_goes_on_with(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), WorkDir(out, "s") as work:
        work.save(1)
        raise KeyboardInterrupt
    with WorkDir(out, "s") as work:
        work.leave()
    with WorkDir(out, "s") as work:
        assert work.done == 1
        work.leave()
    with WorkDir(tmp_path / "new", "s") as work:
        work.leave()
    assert names(tmp_path) == {"out.partial"}
