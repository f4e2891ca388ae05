"""Reading llama.cpp's importance matrices, in both of its formats."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.gguf.reader import read_gguf
from dsq.convert.imatrix import read_imatrix
from dsq.convert.pipeline import plan_gguf, run_gguf_plan
from dsq.errors import DsqError, InputError
from dsq.quant.presets import PRESETS
from tests.models import llama_config, write_hf
from tests.peer import llama_quantize

from .test_gguf_reader import build, pair, string, tensor

U32, STRING, ARRAY = 4, 8, 9


def write_gguf(path, sums, counts, **keys):
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_string("general.type", "imatrix")
    defaults = {"datasets": ["code.txt"], "chunk_count": 7, "chunk_size": 512}
    for key, value in {**defaults, **keys}.items():
        if isinstance(value, list):
            writer.add_array(f"imatrix.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"imatrix.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"imatrix.{key}", value)
        elif value is not None:
            writer.add_uint32(f"imatrix.{key}", value)
    for name, values in sums.items():
        writer.add_tensor(f"{name}.in_sum2", f32_unless_said(values))
    for name, values in counts.items():
        writer.add_tensor(f"{name}.counts", f32_unless_said(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def f32_unless_said(values):
    return values if isinstance(values, np.ndarray) else np.asarray(values, np.float32)


def dat_bytes(entries, tail=b""):
    data = struct.pack("<i", len(entries))
    for name, n_calls, values in entries:
        data += struct.pack("<i", len(name)) + name.encode()
        data += struct.pack("<ii", n_calls, len(values)) + np.asarray(values, "<f4").tobytes()
    return data + tail


def test_a_gguf_holds_sums_and_counts(tmp_path):
    path = write_gguf(
        tmp_path / "i.gguf", {"blk.0.attn_q.weight": [[2, 4, 6]]}, {"blk.0.attn_q.weight": [[2]]}
    )
    imatrix = read_imatrix(path)
    np.testing.assert_array_equal(imatrix.values["blk.0.attn_q.weight"], [1, 2, 3])
    assert (imatrix.datasets, imatrix.n_chunks) == (("code.txt",), 7)


def test_a_count_of_zero_means_no_opinion(tmp_path):
    path = write_gguf(tmp_path / "i.gguf", {"w": [[5, 5]]}, {"w": [[0]]})
    np.testing.assert_array_equal(read_imatrix(path).values["w"], [1, 1])


def test_an_old_dat_file(tmp_path):
    path = tmp_path / "i.dat"
    tail = struct.pack("<i", 9) + struct.pack("<i", 4) + b"wiki"
    path.write_bytes(dat_bytes([("w", 4, [4, 8]), ("v", 0, [3])], tail))
    imatrix = read_imatrix(path)
    np.testing.assert_array_equal(imatrix.values["w"], [1, 2])
    np.testing.assert_array_equal(imatrix.values["v"], [3])
    assert (imatrix.datasets, imatrix.n_chunks) == (("wiki",), 9)


@pytest.mark.parametrize("cut", [1, 5, 9, 14, 18])
def test_a_truncated_dat_file_is_refused(tmp_path, cut):
    path = tmp_path / "i.dat"
    path.write_bytes(dat_bytes([("w", 4, [4, 8])])[:cut])
    with pytest.raises(InputError, match="truncated"):
        read_imatrix(path)


def test_values_that_are_not_finite_are_refused(tmp_path):
    path = tmp_path / "i.dat"
    path.write_bytes(dat_bytes([("w", 1, [np.inf, 8])]))
    with pytest.raises(InputError, match="w has values that are NaN or Inf"):
        read_imatrix(path)


def test_a_gguf_that_is_no_imatrix_is_refused(tmp_path):
    path = write_gguf(tmp_path / "i.gguf", {"w": [[5, 5]]}, {"w": [[1]]}, chunk_size=None)
    with pytest.raises(InputError, match=r"imatrix\.chunk_size is missing"):
        read_imatrix(path)


def test_sums_without_counts_are_refused(tmp_path):
    path = write_gguf(tmp_path / "i.gguf", {"w": [[5, 5]]}, {})
    with pytest.raises(InputError, match=r"'w\.counts' is missing"):
        read_imatrix(path)


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "i.dat"
    path.write_bytes(data)
    try:
        read_imatrix(path)
    except InputError:
        pass


# What llama.cpp's loader makes of a file: tools/quantize/quantize.cpp, load_imatrix


def test_one_count_for_each_expert_rounded_as_c_does(tmp_path):
    sums = [[2, 4], [3, 5], [7, 7], [9, 1]]
    path = write_gguf(tmp_path / "i.gguf", {"w": sums}, {"w": [[2.5], [0.5], [0.4], [-2]]})
    values = read_imatrix(path).values["w"]
    third = np.float32(3)
    np.testing.assert_array_equal(
        values, np.float32([np.float32(2) / third, np.float32(4) / third, 3, 5, 1, 1, 1, 1])
    )
    assert values.dtype == np.float32


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_a_file_gives_the_bytes_of_llama_quantize(tmp_path, form):
    source = open_checkpoint(write_hf(tmp_path / "hf", llama_config(num_hidden_layers=1)))
    f32 = tmp_path / "f32.gguf"
    run_gguf_plan(source, plan_gguf(source, PRESETS["f32"]), f32)
    sums, counts = sums_and_counts(f32)
    # The loader's arithmetic: one float32 division a value
    expected = {
        name: np.array([value / np.float32(counts[name]) for value in row], np.float32)
        for name, row in sums.items()
    }
    path = tmp_path / f"i.{form}"
    if form == "gguf":
        shaped = {name: row[None] for name, row in sums.items()}
        write_gguf(path, shaped, {name: [[n]] for name, n in counts.items()})
    else:
        entries = [(name, counts[name], row) for name, row in sums.items()]
        path.write_bytes(dat_bytes(entries, struct.pack("<ii", 7, 8) + b"code.txt"))
    imatrix = read_imatrix(path)
    assert imatrix.values.keys() == expected.keys()
    for name, values in expected.items():
        assert imatrix.values[name].dtype == np.float32
        np.testing.assert_array_equal(imatrix.values[name], values, err_msg=name)

    ours, theirs, plain = (tmp_path / f"{name}.gguf" for name in ("ours", "theirs", "plain"))
    run_gguf_plan(source, plan_gguf(source, PRESETS["q4_k_m"], imatrix=imatrix), ours)
    run_gguf_plan(source, plan_gguf(source, PRESETS["q4_k_m"]), plain)
    assert llama_quantize(f32, theirs, PRESETS["q4_k_m"].ftype, imatrix=expected) is None
    a, b, c = read_gguf(ours), read_gguf(theirs), read_gguf(plain)
    assert list(a.tensors) == list(b.tensors)
    for name in a.tensors:
        np.testing.assert_array_equal(a.data(name), b.data(name), err_msg=name)
    assert any((a.data(name) != c.data(name)).any() for name in sums)  # the imatrix was used
    assert_keys_of(a, path, len(sums))


def sums_and_counts(model):
    rng = np.random.default_rng(3)
    names = {
        t.name: t.n_per_row
        for t in read_gguf(model).tensors.values()
        if len(t.shape) == 2 and t.name != "token_embd.weight"
    }
    sums = {name: 100 * rng.random(n, dtype=np.float32) ** 4 + 1 for name, n in names.items()}
    return sums, {name: 3584 + 7 * i for i, name in enumerate(names)}


def assert_keys_of(file, imatrix_path, n_entries):
    """As llama-quantize writes them."""
    expected = {
        "quantize.imatrix.file": (str(imatrix_path), STRING),
        "quantize.imatrix.dataset": ("code.txt", STRING),
        "quantize.imatrix.entries_count": (n_entries, U32),
        "quantize.imatrix.chunks_count": (7, U32),
    }
    for key, (value, kind) in expected.items():
        assert file.metadata[key] == value
        assert file.metadata_types[key] == (kind, None)


# Files that are wrong


def test_counts_that_do_not_divide_the_sums_are_refused(tmp_path):
    path = write_gguf(tmp_path / "i.gguf", {"w": [[5, 5, 5]]}, {"w": [[1], [1]]})
    with pytest.raises(
        InputError, match=r"'w\.in_sum2' has 3 values, but 'w\.counts' has 2, which"
    ):
        read_imatrix(path)


@pytest.mark.parametrize("kind", ["in_sum2", "counts"])
@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32])
def test_another_type_than_f32_is_refused(tmp_path, kind, dtype):
    values = {"in_sum2": [[5, 5]], "counts": [[1]]}
    values[kind] = np.asarray(values[kind], dtype)
    path = write_gguf(tmp_path / "i.gguf", {"w": values["in_sum2"]}, {"w": values["counts"]})
    name = {"float16": "f16", "float64": "f64", "int32": "i32"}[np.dtype(dtype).name]
    with pytest.raises(
        InputError, match=rf"(?i)tensor 'w\.{kind}' is of type {name}, F32 is needed"
    ):
        read_imatrix(path)


def test_counts_without_sums_are_refused(tmp_path):
    path = write_gguf(tmp_path / "i.gguf", {"w": [[5]]}, {"w": [[1]], "v": [[1]]})
    with pytest.raises(InputError, match=r"'v\.in_sum2' is missing"):
        read_imatrix(path)


def test_a_gguf_without_sums_is_refused(tmp_path):
    path = write_gguf(tmp_path / "i.gguf", {}, {})
    with pytest.raises(InputError, match=r"no tensor is named \.\.\.\.in_sum2"):
        read_imatrix(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["in_sum2", "counts"])
def test_a_gguf_with_values_that_are_not_finite_is_refused(tmp_path, kind, bad):
    values = {"in_sum2": [[5, 5]], "counts": [[1]]}
    values[kind][0][0] = bad
    path = write_gguf(tmp_path / "i.gguf", {"w": values["in_sum2"]}, {"w": values["counts"]})
    with pytest.raises(InputError, match=rf"w\.{kind} has values that are NaN or Inf"):
        read_imatrix(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("datasets", "code.txt", "datasets is 'code.txt'; a list of strings"),
        ("datasets", [1, 2], r"datasets is array.*; a list of strings"),
        ("datasets", 3, "datasets is 3; a list of strings"),
        ("chunk_count", "7", "chunk_count is '7'; a number from 0 to 4294967295"),
        ("chunk_count", 7.5, "chunk_count is 7.5; a number"),
        ("chunk_count", [7], r"chunk_count is array\(\[7\].*; a number"),
        ("chunk_size", "512", "chunk_size is '512'; a number"),
    ],
)
def test_keys_of_another_type_are_refused(tmp_path, key, value, message):
    path = write_gguf(tmp_path / "i.gguf", {"w": [[5]]}, {"w": [[1]]}, **{key: value})
    with pytest.raises(InputError, match=rf"imatrix\.{message}") as caught:
        read_imatrix(path)
    assert "\n" not in str(caught.value)


def strings(*texts):
    return struct.pack("<IQ", STRING, len(texts)) + b"".join(map(string, texts))


GOOD_KEYS = {
    "imatrix.datasets": (ARRAY, strings("code.txt")),
    "imatrix.chunk_count": (U32, struct.pack("<I", 7)),
    "imatrix.chunk_size": (U32, struct.pack("<I", 512)),
}


@pytest.mark.parametrize("ne", [[2**62, 4], [2**63, 2], [2**32, 2**32], [0, 1], [2**40]])
def test_shapes_that_overflow_are_refused(tmp_path, ne):
    path = tmp_path / "i.gguf"
    pairs = tuple(pair(key, *value) for key, value in GOOD_KEYS.items())
    tensors = (tensor("w.in_sum2", ne), tensor("w.counts", [1], offset=32))
    path.write_bytes(build(pairs, tensors, bytes(64)))
    with pytest.raises(InputError, match=r"w\.in_sum2"):
        read_imatrix(path)


KEY_VALUES = st.sampled_from(
    (
        *GOOD_KEYS.values(),
        (STRING, string("x")),
        (ARRAY, strings()),
        (ARRAY, struct.pack("<IQI", U32, 1, 7)),
        (7, b"\1"),
        (6, struct.pack("<f", float("nan"))),
        (5, struct.pack("<i", -1)),
        (10, struct.pack("<Q", 2**64 - 1)),
        (12, struct.pack("<d", 1e300)),
    )
)
SIZES = st.integers(0, 8) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64 - 1])
TENSORS = st.builds(
    tensor,
    st.sampled_from(["w.in_sum2", "w.counts", "v.in_sum2", ".counts", "w", "a.counts.in_sum2"]),
    st.lists(SIZES, max_size=3),
    st.sampled_from([0, 0, 0, 0, 1, 2, 8, 26, 28, 30, 99]),
    st.sampled_from([0, 32, 64, 31, 2**63]),
)


@settings(max_examples=150, deadline=None, database=None)
@given(
    changes=st.dictionaries(st.sampled_from([*GOOD_KEYS]), KEY_VALUES | st.none(), max_size=1),
    counts=st.lists(st.integers(1, 4), max_size=2),
    sums=st.lists(st.integers(1, 4), max_size=2),
    more=st.lists(TENSORS, max_size=2),
    data=st.binary(max_size=128),
)
def test_any_gguf_is_read_or_refused(tmp_path_factory, changes, counts, sums, more, data):
    path = tmp_path_factory.mktemp("fuzz") / "i.gguf"
    keys = {**GOOD_KEYS, **changes}
    pairs = tuple(pair(key, *value) for key, value in keys.items() if value is not None)
    tensors = (tensor("u.in_sum2", sums), tensor("u.counts", counts, offset=64), *more)
    path.write_bytes(build(pairs, tensors, data.ljust(128, b"\0")))
    message = ""
    try:
        read_imatrix(path)
    except DsqError as error:
        message = str(error)
    assert "\n" not in message
