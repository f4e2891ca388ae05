"""The safetensors reader: equal to upstream's on good files, one clear line on bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dsq.convert.mapped import MappedFiles
from dsq.convert.safetensors_reader import MAX_HEADER_BYTES, read_header
from dsq.errors import InputError, UnsupportedError
from dsq.quant.scheme import BF16, F16, F32


def build(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(
    begin: int, end: int, dtype: str = "F32", shape: list[Any] | None = None
) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape or [(end - begin) // 4], "data_offsets": [begin, end]}


def test_equal_to_upstream(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    rng = np.random.default_rng(0)
    weights = {
        "b": rng.standard_normal((3, 5), dtype=np.float32),
        "a": rng.standard_normal((2, 2, 2)).astype(np.float16),
        "scalar": np.full((), 7, np.float32),
        "nothing": np.empty((0, 4), np.float32),
    }
    save_file(weights, path, metadata={"format": "pt"})
    found = read_header(path)
    assert set(found) == set(weights)
    files = MappedFiles()
    for name, info in found.items():
        assert info.shape == weights[name].shape
        assert info.type is (F16 if name == "a" else F32)
        assert (info.name, info.path) == (name, path)
        data = files.view(info)
        assert data.tobytes() == weights[name].tobytes()
        assert not data.flags.writeable


def test_bfloat16(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(build({"a": entry(0, 6, "BF16", [3])}, bytes(6)))
    assert read_header(path)["a"].type is BF16


def test_integers_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"q.qweight": np.arange(6, dtype=np.int32).reshape(2, 3)}, path)
    with pytest.raises(UnsupportedError, match=r"tensor 'q\.qweight' is of type 'I32'"):
        read_header(path)
    info = read_header(path, integers=True)["q.qweight"]
    assert (info.type.name, info.shape) == ("i32", (2, 3))


def test_unneeded_buffers_of_other_types_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({name: np.zeros(4), "a": np.ones(2, np.float32)}, path)
    assert list(read_header(path)) == ["a"]
    save_file({"other": np.zeros(4)}, path)
    with pytest.raises(UnsupportedError, match="tensor 'other' is of type 'F64'"):
        read_header(path)


NAN = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,NaN]}}'
TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}'
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a safetensors file, or truncated"),
    "seven bytes": (bytes(7), "not a safetensors file, or truncated"),
    "truncated header": (build({"a": entry(0, 4)}, bytes(4))[:30], "the header claims"),
    "huge header": ((1 << 63).to_bytes(8, "little") + b"{}", "claims 9223372036854775808 bytes"),
    "no object": (build(b"[]"), "its header is no JSON object"),
    "leading space": (build(b" {}"), "its header is no JSON object"),
    "no JSON": (build(b"{"), "the header: not valid JSON"),
    "not UTF-8": (build(b'{"\xff":1}'), "the header is not UTF-8 (byte 2)"),
    "deep": (build(b'{"a":' + b"[" * 100_000), "the header: not valid JSON"),
    "long integer": (build(b'{"a":' + b"9" * 5000 + b"}"), "the header: not valid JSON"),
    "NaN": (build(NAN, bytes(4)), "NaN is no JSON"),
    "metadata": (build({"__metadata__": []}), "__metadata__ in the header is no object of strings"),
    "half a character": (build(b'{"\\ud800":1}'), "the key '\\ud800' is no text"),
    "double name": (build(TWICE, bytes(4)), "the key 'a' is given twice"),
    "no entry": (build({"a": 1}), "tensor 'a': its header entry is no object"),
    "no dtype": (build({"a": {"shape": [1], "data_offsets": [0, 4]}}), "dtype is missing"),
    "negative": (build({"a": entry(0, 4, shape=[-1])}, bytes(4)), "shape is missing or no list"),
    "bool": (build({"a": entry(0, 4, shape=[True])}, bytes(4)), "shape is missing or no list"),
    "float": (build({"a": entry(0, 4, shape=[1.0])}, bytes(4)), "shape is missing or no list"),
    "rank": (build({"a": entry(0, 4, shape=[1] * 9)}, bytes(4)), "shape is missing or no list"),
    "offsets": (build({"a": entry(4, 0, shape=[1])}, bytes(4)), "data_offsets is missing"),
    "one offset": (
        build({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, bytes(4)),
        "data_offsets is missing",
    ),
    "dtype": (build({"a": entry(0, 4, "F8_E4M3", [4])}, bytes(4)), "type 'F8_E4M3'"),
    "size": (
        build({"a": entry(0, 4, shape=[2])}, bytes(4)),
        "F32 of shape [2] takes 8 bytes but its data_offsets span 4",
    ),
    "huge size": (build({"a": entry(0, 4, shape=[10**18] * 8)}, bytes(4)), "more than 2^64 bytes"),
    "overlap": (
        build({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
        "tensor 'b' overlaps the tensor before it",
    ),
    "hole": (build({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "leaves a hole before it"),
    "hole at the start": (build({"a": entry(4, 8)}, bytes(8)), "leaves a hole before it"),
    "truncated": (build({"a": entry(0, 8)}, bytes(7)), "ends at byte 8 of the data but the file"),
    "trailing": (build({"a": entry(0, 8)}, bytes(9)), "1 bytes follow the last tensor"),
    "only data": (build({}, bytes(3)), "3 bytes follow the last tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    raw, message = BAD[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw)
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_header_limit(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with open(path, "wb") as file:  # sparse: takes no room on the disk
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)
    with pytest.raises(InputError, match="the header has 100000001 bytes; the limit is 100000000"):
        read_header(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the file: No such file"):
        read_header(tmp_path / "none")


# Hostile files: whatever the bytes, an InputError or what upstream finds, nothing else


def agrees_with_upstream(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    try:
        found = read_header(path, integers=True)
    except InputError:
        return  # we may be stricter
    try:
        with safe_open(path, "np") as upstream:
            # is_ignored leaves nothing out here: no tensor is named inv_freq
            assert sorted(found) == sorted(upstream.keys())
    except SafetensorError as error:
        raise AssertionError(f"upstream refuses what we accept: {error}") from error


VALID = build(
    {
        "__metadata__": {"format": "pt"},
        "a": entry(0, 32, shape=[2, 4]),
        "b": entry(32, 36, "BF16", [2]),
    },
    bytes(36),
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "m.safetensors"


def test_the_fuzzed_file_is_valid(scratch: Path) -> None:
    scratch.write_bytes(VALID)
    assert list(read_header(scratch)) == ["a", "b"]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=4))
def test_overwritten_bytes(scratch: Path, at: int, new: bytes) -> None:
    raw = bytearray(VALID)
    raw[at : at + len(new)] = new
    agrees_with_upstream(scratch, bytes(raw))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 70) | st.sampled_from(("F32", "I8", "a")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(("dtype", "shape", "data_offsets", "a")), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(("a", "b", "__metadata__")), JSON), st.binary(max_size=16))
def test_any_json(scratch: Path, header: dict[str, Any], data: bytes) -> None:
    agrees_with_upstream(scratch, build(header, data))


def test_every_truncation(scratch: Path) -> None:
    for n in range(len(VALID)):
        scratch.write_bytes(VALID[:n])
        with pytest.raises(InputError):
            read_header(scratch)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes(scratch: Path, raw: bytes) -> None:
    agrees_with_upstream(scratch, raw)
    agrees_with_upstream(scratch, build(b"{" + raw))
