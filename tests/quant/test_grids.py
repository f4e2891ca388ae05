"""Taking ggml's blocks apart and putting them together again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsq.errors import UnsupportedError
from dsq.quant import ggml
from dsq.quant.grids import GRIDS, grid
from dsq.quant.scheme import BY_NAME

NAMES = sorted(GRIDS)


def quantized(name: str, seed: int, n_rows: int = 5, n_per_row: int = 512) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((n_rows, n_per_row), dtype=np.float32)
    values *= rng.lognormal(sigma=2, size=(n_rows, 1)).astype(np.float32)
    return ggml.quantize(values, BY_NAME[name], np.ones(n_per_row, np.float32))


def any_bytes(name: str, seed: int, n_blocks: int = 24) -> np.ndarray:
    """Blocks of random bits, as long as ggml takes them: no scale is Inf or NaN."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (n_blocks, BY_NAME[name].block_bytes), np.uint8)
    fields = data.reshape(-1).view(GRIDS[name].struct)
    for key in {"d", "m", "dmin"} & set(fields.dtype.names):
        fields[key] = rng.standard_normal(n_blocks).astype(np.float16)
    assert ggml.is_valid(data, BY_NAME[name])
    return data


@pytest.mark.parametrize("name", NAMES)
def test_a_block_is_as_long_as_ggml_says(name: str) -> None:
    assert GRIDS[name].struct.itemsize == BY_NAME[name].block_bytes
    assert GRIDS[name].codes(quantized(name, 0)).shape[1] == BY_NAME[name].block_size


@pytest.mark.parametrize("make", [quantized, any_bytes])
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_values_and_bytes_are_ggmls(name: str, make, seed: int) -> None:
    data = make(name, seed)
    grid_ = GRIDS[name]
    theirs = ggml.dequantize(data, BY_NAME[name], BY_NAME[name].block_size)
    np.testing.assert_array_equal(grid_.dequantize(data).view(np.uint32), theirs.view(np.uint32))
    np.testing.assert_array_equal(grid_.pack(data, grid_.codes(data)), data)


@pytest.mark.parametrize("name", NAMES)
def test_new_codes_take_the_place_of_old_ones_under_the_same_scales(name: str) -> None:
    grid_ = GRIDS[name]
    data = any_bytes(name, 3)
    codes = np.random.default_rng(4).integers(0, len(grid_.levels), grid_.codes(data).shape)
    packed = grid_.pack(data, codes.astype(np.uint8))
    scale, minimum = grid_.unpack(data)
    expected = scale[..., None] * grid_.levels[codes].reshape(*scale.shape, -1)
    if minimum is not None:
        expected -= minimum[..., None]
    theirs = ggml.dequantize(packed, BY_NAME[name], codes.shape[1])
    np.testing.assert_array_equal(theirs, expected.reshape(theirs.shape))


def test_a_type_of_codebooks_has_no_grid() -> None:
    with pytest.raises(UnsupportedError, match=r"iq2_xs has no grid .* q4_0, "):
        grid(BY_NAME["iq2_xs"])
