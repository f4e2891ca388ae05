"""Other metadata, the same tensor bytes; the source untouched; nothing half-written."""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.gguf import rewrite
from dsq.convert.gguf.metadata import ARRAY, BOOL, F32, F64, I32, STRING, U32, U64, KeyValue
from dsq.convert.gguf.reader import GgufFile, read_gguf
from dsq.convert.gguf.rewrite import copy_bytes, rewrite_gguf
from dsq.convert.pipeline import plan_gguf, run_gguf_plan
from dsq.errors import DsqError, InputError
from dsq.quant.presets import PRESETS
from tests.convert.test_gguf_reader import build, pair, tensor
from tests.peer import llama_quantize
from tests.tiny_gguf import write_tiny_gguf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


def own_entries(file: GgufFile) -> list[KeyValue]:
    return [KeyValue(key, value, *file.metadata_types[key]) for key, value in file.metadata.items()]


def data_hashes(path: Path) -> dict[str, str]:
    """By gguf-py's reader."""
    return {
        str(t.name): hashlib.sha256(t.data.tobytes()).hexdigest()
        for t in gguf.GGUFReader(path).tensors
    }


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_the_same_metadata_gives_the_same_file(tiny, tmp_path):
    file = read_gguf(tiny)
    assert rewrite_gguf(file, own_entries(file), tmp_path / "copy.gguf") == [tmp_path / "copy.gguf"]
    assert (tmp_path / "copy.gguf").read_bytes() == tiny.read_bytes()


def test_other_metadata_and_the_same_tensors(tiny, tmp_path):
    before = hashlib.sha256(tiny.read_bytes()).hexdigest()
    file = read_gguf(tiny)
    entries = [
        replace(e, value="mended" * 9) if e.key.endswith(".pre") else e for e in own_entries(file)
    ]
    entries = [e for e in entries if e.key != "tokenizer.chat_template"]
    entries += [
        KeyValue("a.flag", True, BOOL),
        KeyValue("a.text", "Grüße 世界", STRING),
        KeyValue("a.double", 0.1, F64),
        KeyValue("a.large", 1 << 63, U64),
        KeyValue("a.list", [-1, 2], ARRAY, I32),
        KeyValue("a.nothing", [], ARRAY, STRING),
    ]
    rewrite_gguf(file, entries, tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    keys = [key for key in reader.fields if not key.startswith("GGUF.")]
    assert keys == [e.key for e in entries]
    for entry in entries[:-1]:  # gguf-py has no contents for an empty array
        said = np.asarray(reader.fields[entry.key].contents())
        assert np.array_equal(said, np.asarray(entry.value)), entry.key
    assert data_hashes(tmp_path / "out.gguf") == data_hashes(tiny)
    assert hashlib.sha256(tiny.read_bytes()).hexdigest() == before


@settings(max_examples=30, deadline=None)
@given(alignment=st.sampled_from([8, 32, 64, 4096]), length=st.integers(0, 200))
def test_any_alignment_is_kept(tmp_path_factory, alignment, length):
    """Whatever the header's new length, the data begins where the alignment says."""
    folder = tmp_path_factory.mktemp("aligned")
    writer = gguf.GGUFWriter(folder / "in.gguf", "llama")
    writer.add_custom_alignment(alignment)
    rng = np.random.default_rng(length)
    for i in range(3):
        writer.add_tensor(f"t{i}", rng.standard_normal(5 + i, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(folder / "in.gguf")
    entries = [*own_entries(file), KeyValue("k", "x" * length, STRING)]
    rewrite_gguf(file, entries, folder / "out.gguf")
    assert data_hashes(folder / "out.gguf") == data_hashes(folder / "in.gguf")
    assert all(t.offset % alignment == 0 for t in read_gguf(folder / "out.gguf").tensors.values())


def test_a_file_without_tensors(tmp_path):
    """llama.cpp's vocabulary files are such: a header, with or without padding behind it."""
    for i, padding in enumerate((b"", b"\0" * 32)):
        source = tmp_path / f"in{i}.gguf"
        source.write_bytes(
            build((pair("k", U32, b"\1\0\0\0"),)).rstrip(b"\0") + b"\0" * 3 + padding
        )
        file = read_gguf(source)
        rewrite_gguf(file, [*own_entries(file), KeyValue("f", 0.5, F32)], tmp_path / f"out{i}.gguf")
        assert read_gguf(tmp_path / f"out{i}.gguf").metadata == {"k": 1, "f": 0.5}


def test_version_2_stays_version_2(tmp_path):
    source = tmp_path / "in.gguf"
    source.write_bytes(build((), (tensor("t", [8]),), b"\7" * 32, version=2))
    rewrite_gguf(read_gguf(source), [KeyValue("k", 1, U32)], tmp_path / "out.gguf")
    out = read_gguf(tmp_path / "out.gguf")
    assert out.version == 2
    assert out.data("t").tobytes() == b"\7" * 32


def test_what_stands_behind_the_tensors_comes_along(tmp_path):
    source = tmp_path / "in.gguf"
    source.write_bytes(build((), (tensor("t", [8]),), b"\7" * 32 + b"behind"))
    rewrite_gguf(read_gguf(source), [KeyValue("k", 1, U32)], tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes().endswith(b"\7" * 32 + b"behind")


def test_a_value_that_cannot_be_copied_exactly_is_refused(tmp_path):
    source = tmp_path / "in.gguf"
    source.write_bytes(build((pair("yes", BOOL, b"\2"),)))
    with pytest.raises(DsqError, match="cannot copy exactly"):
        rewrite_gguf(read_gguf(source), [], tmp_path / "out.gguf")
    assert names(tmp_path) == ["in.gguf"]


# -- shards


@pytest.fixture
def split(tiny, tmp_path):
    folder = tmp_path / "split"
    folder.mkdir()
    checkpoint = open_checkpoint(tiny)
    plan = plan_gguf(checkpoint, PRESETS["f32"], split_max_bytes=150_000)
    run_gguf_plan(checkpoint, plan, folder / "m.gguf")
    assert len(names(folder)) > 2
    return folder


def test_all_shards_are_written(split, tmp_path):
    count = len(names(split))
    source = split / f"m-00001-of-{count:05d}.gguf"
    file = read_gguf(source)
    entries = [
        replace(e, value=True) if e.key.endswith("add_bos_token") else e for e in own_entries(file)
    ]
    for out in (tmp_path / "a" / "new.gguf", tmp_path / "b" / f"new-00001-of-{count:05d}.gguf"):
        out.parent.mkdir()
        written = rewrite_gguf(file, entries, out)
        assert names(out.parent) == [f"new-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
        for old, new in zip(sorted(split.iterdir()), written, strict=True):
            assert data_hashes(new) == data_hashes(old)
        assert len(read_gguf(written[0]).tensors) == len(file.tensors)
    assert llama_quantize(written[0], tmp_path / "joined.gguf", 0) is None  # llama.cpp reads them


def test_no_shard_is_written_over(split):
    count = len(names(split))
    file = read_gguf(split / f"m-00001-of-{count:05d}.gguf")
    with pytest.raises(InputError, match="never written to"):
        rewrite_gguf(file, own_entries(file), split / "m.gguf", force=True)


# -- the target


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_the_source_is_never_the_target(tiny, tmp_path, link):
    source = tmp_path / "source.gguf"
    source.write_bytes(tiny.read_bytes())
    out = source
    if link is not None:
        out = tmp_path / "link.gguf"
        link(source, out)
    file = read_gguf(source)
    with pytest.raises(InputError, match="never written to"):
        rewrite_gguf(file, own_entries(file), out, force=True)
    assert source.read_bytes() == tiny.read_bytes()


def test_an_existing_target_needs_force(tiny, tmp_path):
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    file = read_gguf(tiny)
    with pytest.raises(InputError, match="--force"):
        rewrite_gguf(file, own_entries(file), out)
    assert out.read_text() == "mine"
    rewrite_gguf(file, own_entries(file), out, force=True)
    assert out.read_bytes() == tiny.read_bytes()
    assert names(tmp_path) == ["out.gguf"]


def test_a_copy_that_fails_leaves_nothing(tiny, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    file = read_gguf(tiny)
    for way in ("_by_kernel", "_by_sendfile", "_by_hand"):
        monkeypatch.setattr(rewrite, way, full)
    with pytest.raises(InputError, match="disk is full"):
        rewrite_gguf(file, own_entries(file), tmp_path / "out.gguf")
    assert names(tmp_path) == []


def test_a_copy_with_a_wrong_header_never_appears(tiny, tmp_path, monkeypatch):
    file = read_gguf(tiny)
    right = rewrite.encode_header
    calls = []

    def careless(version, entries, tensors, start):
        calls.append(start)
        if len(calls) == 3:  # after the two of the source's own header
            tensors = list(reversed(tensors))
        return right(version, entries, tensors, start)

    monkeypatch.setattr(rewrite, "encode_header", careless)
    with pytest.raises(DsqError, match="did not arrive whole"):
        rewrite_gguf(file, own_entries(file), tmp_path / "out.gguf")
    assert len(calls) == 3
    assert names(tmp_path) == []


# -- how bytes are copied


@pytest.mark.parametrize("kernel", [None, errno.EXDEV, errno.EINVAL, errno.ENOSYS, "nothing"])
@pytest.mark.parametrize("sendfile", [None, errno.EINVAL, "nothing"])
def test_every_way_copies_the_same(tmp_path, monkeypatch, kernel, sendfile):
    """What the first way cannot do, the next one does; also in several pieces."""

    def fails(how):
        def way(*_):
            if how == "nothing":
                return 0
            raise OSError(how, "not here")

        return way

    for name, how in (("_by_kernel", kernel), ("_by_sendfile", sendfile)):
        if how is not None:
            monkeypatch.setattr(rewrite, name, fails(how))
    monkeypatch.setattr(rewrite, "_CHUNK", 70_000)
    content = np.random.default_rng(0).bytes(300_001)
    (tmp_path / "a").write_bytes(content)
    told = []
    with open(tmp_path / "a", "rb") as a, open(tmp_path / "b", "wb", buffering=0) as b:
        b.write(b"head")
        copy_bytes(a.fileno(), b.fileno(), 1000, 299_000, told.append)
    assert (tmp_path / "b").read_bytes() == b"head" + content[1000:300_000]
    assert sum(told) == 299_000


def test_a_source_that_ends_early_is_told(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    with (
        open(tmp_path / "a", "rb") as a,
        open(tmp_path / "b", "wb", buffering=0) as b,
        pytest.raises(InputError, match="shrank"),
    ):
        copy_bytes(a.fileno(), b.fileno(), 0, 200, lambda n: None)
