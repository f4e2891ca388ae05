"""Scales put into a block are those that the reader finds there, as near as the type allows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsq.quant import ggml
from dsq.quant.grids import GRIDS, Grid
from dsq.quant.scales import with_scales
from dsq.quant.scheme import ggml_type

N_IN = 512
HIGHEST = {"q2_k": 15, "q3_k": 31, "q4_k": 63, "q5_k": 63, "q6_k": 127, "iq4_xs": 31}


def quantized(name: str, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((8, N_IN)).astype(np.float32)
    values[3] = 0  # a row of blocks without a step
    return ggml.quantize(values, ggml_type(name))


@pytest.fixture(params=sorted(GRIDS))
def grid(request: pytest.FixtureRequest) -> Grid:
    return GRIDS[request.param]


def test_its_own_scales_change_nothing(grid: Grid) -> None:
    data = quantized(grid.name)
    same = with_scales(grid, data, *grid.unpack(data))
    live = np.repeat(grid.unpack(data)[0].any(axis=1), grid.struct.itemsize).reshape(data.shape)
    np.testing.assert_array_equal(same[live], data[live])
    to = ggml_type(grid.name)
    np.testing.assert_array_equal(ggml.dequantize(same, to, N_IN), ggml.dequantize(data, to, N_IN))


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0.001, 0.05, 0.5]))
@pytest.mark.parametrize("name", sorted(GRIDS))
def test_as_near_as_the_type_stores_them(name: str, seed: int, spread: float) -> None:
    grid, data = GRIDS[name], quantized(name, seed % 7)
    rng = np.random.default_rng(seed)

    def moved(values: np.ndarray) -> np.ndarray:
        factors = 1 + spread * rng.standard_normal(values.shape)
        return (values * np.abs(factors)).astype(np.float32)

    scale, minimum = grid.unpack(data)
    wanted = moved(scale), None if minimum is None else moved(minimum)
    put = with_scales(grid, data, *wanted)
    np.testing.assert_array_equal(grid.codes(put), grid.codes(data))
    for got, want in zip(grid.unpack(put), wanted, strict=True):
        if got is None or want is None:
            assert got is want is None
            continue
        if name in HIGHEST:
            # Half a step of d, which is at most the old one or what the largest needs.
            largest = np.maximum(np.abs(want).max(axis=1), np.abs(scale).max(axis=1))
            step = np.abs(grid.blocks(put)["d" if want is wanted[0] else "dmin"])
            allowed = (0.501 * step.astype(np.float32) + 1e-3 * largest)[:, None]
        else:
            allowed = 2.0**-10 * np.abs(want) + 1e-7
        assert (np.abs(got - want) <= allowed).all()


def test_a_scale_that_outgrows_its_integers() -> None:
    grid, data = GRIDS["q4_k"], quantized("q4_k")
    scale, minimum = grid.unpack(data)
    put = with_scales(grid, data, 3 * scale, minimum)
    np.testing.assert_allclose(grid.unpack(put)[0], 3 * scale, rtol=0.02, atol=1e-3)
