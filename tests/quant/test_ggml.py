"""Quantizing and dequantizing through libggml-base."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as reference_dequantize

from dsq.errors import DsqError
from dsq.quant import ggml
from dsq.quant.scheme import BY_NAME

# Types that gguf-py, whose numpy code is not ours, can dequantize.
COMMON = (
    "f16 bf16 q4_0 q4_1 q5_0 q5_1 q8_0 q2_k q3_k q4_k q5_k q6_k "
    "iq4_nl iq4_xs iq3_s iq3_xxs tq1_0 tq2_0 mxfp4"
).split()


@pytest.mark.parametrize("name", COMMON)
def test_dequantize_equals_gguf_py(name):
    t = BY_NAME[name]
    values = np.random.default_rng(1).standard_normal((3, 512), dtype=np.float32)
    data = ggml.quantize(values, t, np.ones(512, dtype=np.float32))
    expected = reference_dequantize(data, GGMLQuantizationType(t.id))
    got = ggml.dequantize(data, t, 512)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)


def test_an_imatrix_moves_error_away_from_weighty_channels():
    values = np.random.default_rng(2).standard_normal((64, 256), dtype=np.float32)
    weights = np.where(np.arange(256) % 2, 100.0, 0.01).astype(np.float32)
    t = BY_NAME["q4_0"]
    plain = ggml.dequantize(ggml.quantize(values, t), t, 256) - values
    guided = ggml.dequantize(ggml.quantize(values, t, weights), t, 256) - values
    odd = slice(1, None, 2)
    assert (guided[:, odd] ** 2).mean() < 0.9 * (plain[:, odd] ** 2).mean()


def test_an_imatrix_of_the_wrong_size_is_refused():
    with pytest.raises(DsqError, match="imatrix of"):
        ggml.quantize(np.zeros((1, 256), np.float32), BY_NAME["q4_0"], np.ones(255, np.float32))


def test_nan_scales_are_not_valid():
    t = BY_NAME["q8_0"]
    data = ggml.quantize(np.ones((1, 32), np.float32), t)
    assert ggml.is_valid(data, t)
    data[0, :2] = np.array([np.nan], np.float16).view(np.uint8)
    assert not ggml.is_valid(data, t)
