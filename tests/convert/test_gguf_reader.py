"""The GGUF reader: equal to gguf-py on good files, one clear line on bad ones."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsq.convert.gguf.reader import read_gguf
from dsq.errors import InputError, UnsupportedError

U32, STRING, ARRAY, U64 = 4, 8, 9, 10


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, type_id: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", type_id) + value


def tensor(name: str, ne: list[int], type_id: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(ne)}Q", len(ne), *ne)
    return string(name) + dims + struct.pack("<IQ", type_id, offset)


def build(
    pairs: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    n_tensors, n_pairs = counts or (len(tensors), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_pairs)
    head += b"".join(pairs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (("u8", 200), ("u16", 60000), ("u32", 1 << 31), ("u64", 1 << 63)):
        getattr(writer, f"add_uint{name[1:]}")(name, value)
    for name, value in (("i8", -100), ("i16", -30000), ("i32", -(1 << 31)), ("i64", -(1 << 62))):
        getattr(writer, f"add_int{name[1:]}")(name, value)
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_string("text", "Grüße 世界")
    writer.add_array("strings", ["a", "", "Ġ한"])
    writer.add_array("integers", [1, -2, 3])
    writer.add_array("floats", [0.25, 4.0])
    writer.add_array("bools", [True, False])
    rng = np.random.default_rng(0)
    writer.add_tensor("a.weight", rng.standard_normal((3, 64), dtype=np.float32))
    writer.add_tensor("b.bias", np.arange(5, dtype=np.float16))
    quantized = gguf.quants.quantize(
        rng.standard_normal((4, 64), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("c.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_types_and_values(good: Path) -> None:
    file = read_gguf(good)
    assert (file.version, file.alignment, file.shards) == (3, 32, (good,))
    meta = file.metadata
    assert {k: v for k, v in meta.items() if not isinstance(v, np.ndarray)} == {
        "general.architecture": "llama",
        "u8": 200,
        "u16": 60000,
        "u32": 1 << 31,
        "u64": 1 << 63,
        "i8": -100,
        "i16": -30000,
        "i32": -(1 << 31),
        "i64": -(1 << 62),
        "f32": 0.5,
        "f64": 0.1,
        "yes": True,
        "no": False,
        "text": "Grüße 世界",
        "strings": ["a", "", "Ġ한"],
    }
    assert meta["yes"] is True
    for key, dtype, values in (
        ("integers", np.int32, [1, -2, 3]),
        ("floats", np.float32, [0.25, 4.0]),
        ("bools", np.bool_, [True, False]),
    ):
        assert meta[key].dtype == dtype
        assert meta[key].tolist() == values
    reference = gguf.GGUFReader(good)
    expected = {
        name: tuple([int(t) for t in field.types] + [None])[:2]
        for name, field in reference.fields.items()
        if not name.startswith("GGUF.")
    }
    assert file.metadata_types == expected


def test_tensors_equal_gguf_py(good: Path) -> None:
    file = read_gguf(good)
    reference = {t.name: t for t in gguf.GGUFReader(good).tensors}
    assert list(file.tensors) == list(reference)
    for name, info in file.tensors.items():
        theirs = reference[name]
        assert info.shape == tuple(reversed(theirs.shape.tolist()))
        assert info.type.id == int(theirs.tensor_type)
        assert info.offset == theirs.data_offset
        data = file.data(name)
        assert (data.dtype, data.ndim, data.size) == (np.uint8, 1, info.n_bytes)
        assert data.tobytes() == theirs.data.tobytes()
        assert not data.flags.writeable
        assert not data.flags.owndata  # a view of the mapped file


def test_version_2_and_custom_alignment(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    align = pair("general.alignment", U32, struct.pack("<I", 64))
    infos = (tensor("a", [4], offset=0), tensor("b", [4], offset=64))
    raw = b"GGUF" + struct.pack("<IQQ", 2, 2, 1) + align + b"".join(infos)
    raw += b"\0" * (-len(raw) % 64)
    path.write_bytes(raw + bytes(64) + np.arange(4, dtype="<f4").tobytes())
    file = read_gguf(path)
    assert (file.version, file.alignment) == (2, 64)
    assert file.data("b").view("<f4").tolist() == [0, 1, 2, 3]


def test_scalar_tensor_and_no_tensors(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(build((), (tensor("a", []),), bytes(4)))
    assert read_gguf(path).tensors["a"].shape == ()
    path.write_bytes(build())
    assert read_gguf(path).tensors == {}


def test_empty_arrays_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 2)
    strings = pair("strings", ARRAY, struct.pack("<IQ", STRING, 0))
    path.write_bytes(head + strings + pair("numbers", ARRAY, struct.pack("<IQ", 6, 0)))
    meta = read_gguf(path).metadata
    assert meta["strings"] == []
    assert (meta["numbers"].dtype, meta["numbers"].size) == (np.float32, 0)


A = tensor("a", [8])
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "does not begin with GGUF"),
    "magic": (b"GGML" + bytes(60), "does not begin with GGUF"),
    "magic only": (b"GGUF", "the file ends inside the version"),
    "no version": (build(version=0), "version 0 is not supported"),
    "version 1": (build(version=1), "version 1 is not supported"),
    "version 4": (build(version=4), "version 4 is not supported"),
    "big-endian": (build(version=3 << 24), "big-endian"),
    "tensor count": (build(counts=(1 << 40, 0)), "claims 1099511627776 tensors"),
    "key count": (build(counts=(0, (1 << 64) - 1)), "claims 18446744073709551615 metadata keys"),
    "key length": (
        build((struct.pack("<Q", 1 << 50) + bytes(30),)),
        "the name of metadata key 0 has 1125899906842624 bytes; the limit is 65535",
    ),
    "empty key": (build((pair("", U32, bytes(4)),), data=bytes(32)), "key '' is empty"),
    "double key": (build((pair("a", U32, bytes(4)),) * 2), "key 'a' is double"),
    "key not UTF-8": (build((pair(b"\xff", U32, bytes(4)),)), "metadata key 0 is not UTF-8"),
    "value type": (build((pair("a", 13, bytes(8)),)), "'a' has the unknown value type 13"),
    "string length": (
        build((pair("a", STRING, struct.pack("<Q", 1 << 62)),)),
        "metadata key 'a' has 4611686018427387904 bytes",
    ),
    "string past the end": (
        build((pair("a", STRING, struct.pack("<Q", 1 << 20)),)),
        "the file ends inside metadata key 'a'",
    ),
    "string not UTF-8": (build((pair("a", STRING, string(b"\xc3")),)), "key 'a' is not UTF-8"),
    "nested array": (build((pair("a", ARRAY, struct.pack("<IQ", ARRAY, 1)),)), "unknown type 9"),
    "array length": (
        build((pair("a", ARRAY, struct.pack("<IQ", U64, 1 << 61)),)),
        "the file ends inside metadata key 'a'",
    ),
    "too many strings": (
        build((pair("a", ARRAY, struct.pack("<IQ", STRING, 1 << 40)),)),
        "'a' has 1099511627776 strings; the limit is 16777216",
    ),
    "strings past the end": (
        build((pair("a", ARRAY, struct.pack("<IQQ", STRING, 1, 1 << 63)),)),
        "the file ends inside metadata key 'a'",
    ),
    "second string past the end": (
        build((pair("a", ARRAY, struct.pack("<IQ", STRING, 2) + string("x" * 39)),)),
        "the file ends inside metadata key 'a'",
    ),
    "token not UTF-8": (
        build((pair("a", ARRAY, struct.pack("<IQ", STRING, 2) + string("x") + string(b"\xff")),)),
        "key 'a': string 1 is not UTF-8",
    ),
    "alignment type": (
        build((pair("general.alignment", U64, struct.pack("<Q", 32)),)),
        "general.alignment is not of type uint32",
    ),
    "alignment 0": (build((pair("general.alignment", U32, bytes(4)),)), "must be a power of two"),
    "alignment 48": (
        build((pair("general.alignment", U32, struct.pack("<I", 48)),)),
        "general.alignment is 48; it must be a power of two",
    ),
    "long tensor name": (build((), (tensor("n" * 64, [8]),), bytes(32)), "the limit is 63"),
    "double tensor": (build((), (A, A), bytes(32)), "tensor 'a' is listed twice"),
    "five dimensions": (build((), (tensor("a", [1] * 5),), bytes(32)), "has 5 dimensions"),
    "overflow": (
        build((), (tensor("a", [1 << 32, 1 << 32]),), bytes(32)),
        "impossible dimensions [4294967296, 4294967296]",
    ),
    "dimension 0": (build((), (tensor("a", [8, 0]),), bytes(32)), "impossible dimensions [8, 0]"),
    "type": (build((), (tensor("a", [8], 99),), bytes(32)), "tensor 'a' has the ggml type id 99"),
    "removed type": (build((), (tensor("a", [8], 4),), bytes(32)), "the ggml type id 4"),
    "row": (build((), (tensor("a", [40], 8),), bytes(64)), "q8_0 needs a multiple of 32"),
    "misaligned": (build((), (tensor("a", [8], 0, 16),), bytes(64)), "no multiple of alignment 32"),
    "overlap": (
        build((), (tensor("a", [9]), tensor("b", [8], 0, 32)), bytes(128)),
        "tensors 'a' and 'b' overlap",
    ),
    "past the end": (build((), (A,), bytes(31)), "the file is truncated, download it again"),
    "far past the end": (
        build((), (tensor("a", [8], 0, (1 << 64) - 32),), bytes(32)),
        "the file is truncated",
    ),
    "no padding": (build((), (A,))[:-1], "the file is truncated"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    raw, message = BAD[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(InputError) as caught:
        read_gguf(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["version 1", "version 4", "big-endian", "type"])
def test_what_is_well_formed_is_unsupported(case: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(BAD[case][0])
    with pytest.raises(UnsupportedError):
        read_gguf(path)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the file"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(InputError, match="is a directory"):
        read_gguf(tmp_path)


def test_a_file_that_shrinks_is_noticed(good: Path) -> None:
    file = read_gguf(good)
    good.write_bytes(good.read_bytes()[:-64])
    with pytest.raises(InputError, match="shrank"):
        file.data("c.weight")


def test_unknown_tensor(good: Path) -> None:
    with pytest.raises(InputError, match="there is no tensor 'x'"):
        read_gguf(good).data("x")


# Split models


def split(folder: Path, count: int = 3, **changes: Any) -> Path:
    """`count` shards with a tensor each; `changes` maps a shard's index to other split.* values."""
    for i in range(count):
        values = {"no": i, "count": count, "tensors.count": count, "name": f"t{i}"}
        values.update(changes.get(f"s{i}", {}))
        writer = gguf.GGUFWriter(folder / f"m-{i + 1:05d}-of-{count:05d}.gguf", "llama")
        writer.add_uint16("split.no", values["no"])
        writer.add_uint16("split.count", values["count"])
        writer.add_int32("split.tensors.count", values["tensors.count"])
        writer.add_tensor(values["name"], np.full(4, i, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return folder / f"m-00001-of-{count:05d}.gguf"


def test_split_model(tmp_path: Path) -> None:
    file = read_gguf(split(tmp_path))
    assert [p.name for p in file.shards] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert {n: file.data(n).view(np.float32)[0] for n in file.tensors} == {
        "t0": 0,
        "t1": 1,
        "t2": 2,
    }
    assert [t.path for t in file.tensors.values()] == list(file.shards)


def second(path: Path) -> Path:
    return path.with_name("m-00002-of-00003.gguf")


def rename(path: Path) -> Path:
    return path.rename(path.with_name("other.gguf"))


def rename_second(path: Path) -> Path:
    return second(path).rename(path.with_name("other.gguf"))


def drop_second(path: Path) -> Path:
    second(path).unlink()
    return path


@pytest.mark.parametrize(
    ("changes", "given_path", "message"),
    [
        ({}, second, "shard 2 of 3 of a split model; give m-00001-of-00003.gguf"),
        ({}, rename_second, "shard 2 of 3 of a split model; give the first shard"),
        ({}, rename, "its name must end in -00001-of-00003.gguf"),
        ({}, drop_second, "m-00002-of-00003.gguf: missing: it is shard 2 of 3"),
        ({"s1": {"no": 2}}, None, "split.no and split.count are 2 and 3, expected 1 and 3"),
        ({"s2": {"count": 4}}, None, "split.no and split.count are 2 and 4, expected 2 and 3"),
        ({"s0": {"tensors.count": 4}}, None, "split.tensors.count is 4 but the 3 shards hold 3"),
        ({"s2": {"name": "t0"}}, None, "tensor 't0' is in m-00001-of-00003.gguf as well"),
    ],
)
def test_split_errors(
    changes: dict[str, Any],
    given_path: Callable[[Path], Path] | None,
    message: str,
    tmp_path: Path,
) -> None:
    path = split(tmp_path, **changes)
    with pytest.raises(InputError) as caught:
        read_gguf(given_path(path) if given_path else path)
    assert message in str(caught.value)


def test_split_count_of_another_type(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(build((pair("split.count", STRING, string("2")),)))
    with pytest.raises(InputError, match=r"split\.count is '2'; expected an integer"):
        read_gguf(path)


# Hostile files: whatever the bytes, an InputError or a valid result, nothing else


def survives(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    try:
        file = read_gguf(path)
    except InputError:
        return
    for name in file.tensors:
        assert file.data(name).size == file.tensors[name].n_bytes


VALID = build(
    (
        pair("general.alignment", U32, struct.pack("<I", 32)),
        pair("text", STRING, string("hello")),
        pair("tokens", ARRAY, struct.pack("<IQ", STRING, 2) + string("a") + string("bc")),
        pair("scores", ARRAY, struct.pack("<IQ", 6, 2) + bytes(8)),
        pair("split.count", 2, struct.pack("<H", 1)),
    ),
    (tensor("a", [8, 2]), tensor("b", [32], 8, 64)),
    bytes(64 + 34),
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "m-00001-of-00002.gguf"


def test_the_fuzzed_file_is_valid(scratch: Path) -> None:
    scratch.write_bytes(VALID)
    assert list(read_gguf(scratch).tensors) == ["a", "b"]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(VALID) - 1), st.sampled_from((1, 2, 4, 8)), st.data())
def test_overwritten_bytes(scratch: Path, at: int, n: int, data: st.DataObject) -> None:
    # whole fields of extreme values find more than single random bytes
    extreme = (0, 1, 31, (1 << 8 * n - 1) - 1, 1 << 8 * n - 1, (1 << 8 * n) - 1)
    value = data.draw(st.sampled_from(extreme) | st.integers(0, (1 << 8 * n) - 1))
    raw = bytearray(VALID)
    raw[at : at + n] = (value % (1 << 8 * n)).to_bytes(n, "little")
    survives(scratch, bytes(raw))


def test_every_truncation(scratch: Path) -> None:
    for n in range(len(VALID)):
        scratch.write_bytes(VALID[:n])
        with pytest.raises(InputError):
            read_gguf(scratch)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400), st.sampled_from((b"", b"GGUF\3\0\0\0")))
def test_random_bytes(scratch: Path, raw: bytes, head: bytes) -> None:
    survives(scratch, head + raw)
