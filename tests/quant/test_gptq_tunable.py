"""Scales of a GPTQ matrix that can be learned: what is trained on is what is stored."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dsq.quant.gptq_layout import GptqTensor, pack, unpack

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from dsq.quant.gptq_tunable import GptqTunable  # noqa: E402

N_IN, N_OUT = 96, 64


def packed(bits: int, group: int, scattered: bool, form: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(bits)
    n_groups = -(-N_IN // group)
    g_idx = np.arange(N_IN, dtype=np.int32) // group
    tensor = GptqTensor(
        rng.integers(0, 1 << bits, (N_IN, N_OUT), dtype=np.uint8),
        rng.integers(1, 1 << bits, (n_groups, N_OUT), dtype=np.uint8),
        rng.standard_normal((n_groups, N_OUT)).astype(np.float16),
        rng.permutation(g_idx) if scattered else g_idx,
        bits,
    )
    return pack(tensor, form)


@pytest.mark.parametrize(
    ("bits", "group", "scattered", "form"),
    list(itertools.product((2, 3, 4, 8), (32, 64, 96), (False, True), ("gptq", "gptq_v2"))),
)
def test_weights_are_the_files_and_gradients_autograds(
    bits: int, group: int, scattered: bool, form: str
) -> None:
    parts = packed(bits, group, scattered, form)
    tunable = GptqTunable(parts, bits, form)
    np.testing.assert_array_equal(
        tunable.weight().detach().numpy(), unpack(parts, bits, form).dequantized()
    )
    by_weight = torch.randn(N_OUT, N_IN, generator=torch.Generator().manual_seed(0))
    (tunable.weight() * by_weight).sum().backward()

    stored = unpack(parts, bits, form)
    change = torch.zeros(stored.scales.shape, requires_grad=True)
    scales = torch.from_numpy(stored.scales.astype(np.float32)) * (1 + change)
    levels = torch.from_numpy(stored.codes - stored.zeros[stored.g_idx].astype(np.float32))
    plain = levels * scales[torch.from_numpy(stored.g_idx.astype(np.int64))]
    (plain.T * by_weight).sum().backward()
    torch.testing.assert_close(tunable.change.grad, change.grad, rtol=1e-5, atol=1e-4)


def test_after_a_change_the_weights_are_those_of_the_new_scales() -> None:
    parts = packed(4, 32, True, "gptq")
    tunable = GptqTunable(parts, 4)
    with torch.no_grad():
        tunable.change.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    scales = tunable.scales().half().numpy()
    assert not np.array_equal(scales, parts["scales"])
    np.testing.assert_array_equal(
        tunable.weight().detach().numpy(), unpack({**parts, "scales": scales}, 4).dequantized()
    )


def test_scales_stay_finite_and_not_zero() -> None:
    parts = packed(4, 32, False, "gptq")
    tunable = GptqTunable(parts, 4)
    with torch.no_grad():
        tunable.change[0] = -1.0
        tunable.change[1] = 1e9
    scales = tunable.scales().half()
    assert bool(scales.isfinite().all())
    assert bool((scales != 0).all())
