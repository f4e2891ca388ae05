"""The type table is ggml's own."""

import ctypes

import pytest

from dsq.errors import InputError
from dsq.quant import ggml
from dsq.quant.scheme import BY_ID, BY_NAME, ggml_type


def test_the_table_equals_libggml():
    lib = ggml.library()
    lib.ggml_type_name.restype = ctypes.c_char_p
    lib.ggml_blck_size.restype = ctypes.c_int64
    lib.ggml_type_size.restype = ctypes.c_size_t
    for t in BY_NAME.values():
        assert lib.ggml_type_name(t.id).decode().lower() == t.name
        assert lib.ggml_blck_size(t.id) == t.block_size
        assert lib.ggml_type_size(t.id) == t.block_bytes


def test_the_table_lacks_no_type_of_libggml():
    lib = ggml.library()
    lib.ggml_type_size.restype = ctypes.c_size_t
    count = max(BY_ID) + 1
    known = {i for i in range(count) if lib.ggml_type_size(i) > 0}
    assert known == set(BY_ID)


def test_a_row_that_is_no_multiple_of_the_block_is_refused():
    with pytest.raises(InputError, match="576 values does not divide into q4_k blocks of 256"):
        BY_NAME["q4_k"].row_bytes(576)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match=r"'q4_z'.*q4_0"):
        ggml_type("q4_z")
