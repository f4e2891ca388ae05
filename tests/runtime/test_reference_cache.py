"""The reference cache: hits, misses, damage, bounds."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from dsq.errors import DsqError
from dsq.quant.drift import PackedRows, pack
from dsq.runtime.reference_cache import (
    CorruptEntry,
    ReferenceCache,
    Shape,
    default_folder,
    file_identity,
)

SHAPE = Shape(windows=3, rows=5, n_vocab=7)  # odd sizes: padding is exercised


def rows(seed: int, shape: Shape = SHAPE) -> PackedRows:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((shape.rows, shape.n_vocab)).astype(np.float32)
    return pack(logits, rng.integers(0, shape.n_vocab, shape.rows))


def fill(cache: ReferenceCache, key: str, shape: Shape = SHAPE) -> None:
    with cache.writer(key, shape) as writer:
        for i in range(shape.windows):
            writer.append(rows(i, shape))


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path)
    assert cache.open("k", SHAPE) is None
    fill(cache, "k")
    stored = cache.open("k", SHAPE)
    assert stored is not None
    for i in (2, 0, 1):
        for field in ("codes", "scale", "nll", "top"):
            np.testing.assert_array_equal(getattr(stored.window(i), field), getattr(rows(i), field))
    assert (tmp_path / "k.dsqref").stat().st_size == SHAPE.file_bytes


def test_another_key_or_shape_is_a_miss(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path)
    fill(cache, "k")
    assert cache.open("other", SHAPE) is None
    # the same number of bytes, so only the header tells
    assert cache.open("k", Shape(3, 5, 8)) is None


def test_a_truncated_entry_is_a_miss_and_goes(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path)
    fill(cache, "k")
    file = tmp_path / "k.dsqref"
    file.write_bytes(file.read_bytes()[:-1])
    assert cache.open("k", SHAPE) is None
    assert not file.exists()


@pytest.mark.parametrize("where", [64, 75, 100, 130, 140])
def test_a_changed_byte_is_noticed(tmp_path: Path, where: int) -> None:
    cache = ReferenceCache(tmp_path)
    fill(cache, "k")
    file = tmp_path / "k.dsqref"
    data = bytearray(file.read_bytes())
    data[where] ^= 1
    file.write_bytes(data)
    stored = cache.open("k", SHAPE)
    assert stored is not None
    stored.window(1)
    with pytest.raises(CorruptEntry):
        stored.window(0)
    assert not file.exists()


def test_nothing_is_left_of_an_interrupted_write(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path)

    def write(then: type[BaseException] | None) -> None:
        with cache.writer("k", SHAPE) as writer:
            writer.append(rows(0))
            if then is not None:
                raise then

    with pytest.raises(KeyboardInterrupt):
        write(KeyboardInterrupt)
    with pytest.raises(ValueError, match="incomplete"):
        write(None)
    assert list(tmp_path.iterdir()) == []


def test_the_least_recently_used_entries_make_room(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, limit=3 * SHAPE.file_bytes)
    for age, key in enumerate(("a", "b", "c")):
        fill(cache, key)
        os.utime(tmp_path / f"{key}.dsqref", (1000 + age, 1000 + age))
    assert cache.open("a", SHAPE) is not None  # now the newest
    fill(cache, "d")
    assert {p.stem for p in tmp_path.iterdir()} == {"a", "c", "d"}


def test_an_entry_beyond_the_limit_is_not_accepted(tmp_path: Path) -> None:
    assert ReferenceCache(tmp_path, limit=SHAPE.file_bytes).accepts(SHAPE)
    assert not ReferenceCache(tmp_path, limit=SHAPE.file_bytes - 1).accepts(SHAPE)


def test_leftovers_of_dead_runs_are_swept(tmp_path: Path) -> None:
    old, young = tmp_path / "old.tmp", tmp_path / "young.tmp"
    old.write_bytes(b"x")
    young.write_bytes(b"x")
    os.utime(old, (1000, 1000))
    fill(ReferenceCache(tmp_path), "k")
    assert {p.name for p in tmp_path.iterdir()} == {"young.tmp", "k.dsqref"}


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    cache = ReferenceCache(blocked / "sub")
    with pytest.raises(DsqError, match=r"reference cache cannot be written .*DSQ_CACHE"):
        fill(cache, "k")


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DSQ_CACHE", str(tmp_path / "told"))
    assert default_folder() == tmp_path / "told"
    monkeypatch.delenv("DSQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "dsq"


def test_a_file_that_changes_has_another_identity(tmp_path: Path) -> None:
    file = tmp_path / "model"
    file.write_bytes(b"abc")
    os.utime(file, (1, 1))
    first = file_identity([file])
    assert file_identity([file]) == first
    os.utime(file, (1, 2))
    assert file_identity([file]) != first
    file.write_bytes(b"abd")
    os.utime(file, (1, 1))
    assert file_identity([file]) != first
