"""Reading llama.cpp's importance matrices, in both of its formats."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsq.convert.imatrix import read_imatrix
from dsq.errors import InputError


def write_gguf(path, sums, counts, **keys):
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_string("general.type", "imatrix")
    defaults = {"datasets": ["code.txt"], "chunk_count": 7, "chunk_size": 512}
    for key, value in {**defaults, **keys}.items():
        if isinstance(value, list):
            writer.add_array(f"imatrix.{key}", value)
        elif value is not None:
            writer.add_uint32(f"imatrix.{key}", value)
    for name, values in sums.items():
        writer.add_tensor(f"{name}.in_sum2", np.asarray(values, np.float32))
    for name, values in counts.items():
        writer.add_tensor(f"{name}.counts", np.asarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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
    with pytest.raises(InputError, match="no counts"):
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
