"""The stream of slabs: same bytes as one call, in order, and bad weights named."""

import numpy as np
import pytest

from dsq.errors import InputError
from dsq.quant import ggml, stream
from dsq.quant.scheme import BF16, BY_NAME, F32
from dsq.quant.stream import Dither, Job, quantize_stream


def rows(n_rows, n_per_row, seed=0):
    return np.random.default_rng(seed).standard_normal((n_rows, n_per_row), dtype=np.float32)


def job(name, values, to, **more):
    return Job(name, values.view(np.uint8), F32, BY_NAME[to], values.shape[1], **more)


def collect(jobs, threads=2, **more):
    out = {}
    for slab in quantize_stream(jobs, threads=threads, **more):
        out.setdefault(slab.job.name, []).append(slab.data.copy())
    return {name: np.concatenate(parts) for name, parts in out.items()}


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_slabs_and_chunks_do_not_change_a_byte(monkeypatch, threads):
    monkeypatch.setattr(stream, "SLAB_BYTES", 1000)
    monkeypatch.setattr(stream, "CHUNK_VALUES", 700)
    values = [rows(n, 256, n) for n in (1, 7, 50)]
    got = collect([job(str(i), v, "q4_k") for i, v in enumerate(values)], threads)
    assert list(got) == ["0", "1", "2"]
    for i, v in enumerate(values):
        np.testing.assert_array_equal(got[str(i)], ggml.quantize(v, BY_NAME["q4_k"]))


def test_rows_can_be_reordered():
    values = rows(6, 32)
    order = np.array([5, 0, 4, 1, 3, 2])
    got = collect([job("w", values, "q8_0", order=order)])["w"]
    np.testing.assert_array_equal(got, ggml.quantize(values[order], BY_NAME["q8_0"]))


def test_copying_is_exact():
    values = rows(9, 64)
    got = collect([job("w", values, "f32")])["w"]
    np.testing.assert_array_equal(got.view(np.float32), values)


@pytest.mark.parametrize("to", ["f32", "bf16", "q4_0", "q8_0", "q4_k"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_weights_are_counted_and_refused(bad, to):
    values = rows(40, 256)
    values[3, 7] = values[39, 255] = bad
    with pytest.raises(InputError, match=r"blk\.0: 2 weights are NaN or Inf"):
        collect([job("blk.0", values, to)])


@pytest.mark.parametrize("to", ["iq2_xs", "iq3_xxs", "iq3_s", "iq4_xs", "q2_k", "tq2_0"])
def test_nonfinite_weights_do_not_abort_ggml(to):
    values = rows(2, 256)
    values[0, 0], values[1, 3] = np.nan, np.inf
    imatrix = np.ones(256, np.float32)
    with pytest.raises(InputError, match="2 weights are NaN or Inf"):
        collect([job("w", values, to, imatrix=imatrix)])


@pytest.mark.parametrize(("to", "large"), [("f16", 1e5), ("q4_0", 1e6), ("q8_0", 1e7)])
def test_weights_that_would_be_stored_as_inf_are_refused(to, large):
    values = rows(2, 32)
    values[1, 3] = -large
    with pytest.raises(InputError, match=rf"w: 1 weights are too large for {to}"):
        collect([job("w", values, to)])


@pytest.mark.parametrize("to", ["bf16", "f32", "q8_0"])
def test_large_weights_pass_where_they_fit(to):
    values = rows(2, 32)
    values[1, 3] = 1e5
    stored = collect([job("w", values, to)])["w"]
    assert np.isfinite(ggml.dequantize(stored, BY_NAME[to], 32)).all()


def test_nonfinite_weights_pass_when_allowed():
    values = rows(2, 32)
    values[0, 0] = np.nan
    got = collect([job("w", values, "f32")], allow_nonfinite=True)["w"].view(np.float32)
    np.testing.assert_array_equal(got, values)


def test_huge_finite_weights_are_no_false_alarm():
    values = np.full((4, 64), 3e38, dtype=np.float32)
    assert collect([job("w", values, "f32")])["w"].shape == (4, 256)


def test_a_bf16_source_is_widened_exactly():
    bits = np.arange(256, dtype=np.uint16).reshape(4, 64) + 0x3F00
    source = Job("w", bits.view(np.uint8), BF16, F32, 64)
    got = collect([source])["w"].view(np.uint32)
    np.testing.assert_array_equal(got, bits.astype(np.uint32) << 16)


def test_dither_is_seeded_and_as_wide_as_asked():
    t = BY_NAME["q4_1"]
    data = ggml.quantize(rows(64, 512), t)
    plain = ggml.dequantize(data, t, 512)
    step = data.reshape(-1, 20)[:, :2].copy().view(np.float16).astype(np.float32)

    def dithered(seed, threads=2):
        source = Job("w", data, t, F32, 512, noise=Dither(0.3, seed))
        return collect([source], threads)["w"].view(np.float32)

    noise = (dithered(1) - plain).reshape(-1, 32) / step
    assert abs(noise.std() - 0.3) < 0.01
    assert abs(noise.mean()) < 0.01
    np.testing.assert_array_equal(dithered(1), dithered(1, threads=1))
    assert (dithered(1) != dithered(2)).any()
