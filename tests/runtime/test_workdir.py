"""The folder of an unfinished run: what is kept, what is swept away, whose it is."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from dsq.convert.atomic import os_error
from dsq.errors import InputError
from dsq.runtime.calibration.workdir import WorkDir, settings_hash
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
    with pytest.raises(type(error)), WorkDir(tmp_path / "out", "s") as work:
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


def test_settings_differ_by_any_part() -> None:
    ids = np.arange(6, dtype=np.int32)
    parts = [(1, ids), (2, ids), (1, ids + 1), (1, ids.reshape(2, 3)), (1, ids.view(np.float32))]
    assert len({settings_hash(*some) for some in parts}) == len(parts)
    assert settings_hash(1, ids) == settings_hash(1, ids.copy())
