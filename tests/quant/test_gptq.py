"""GPTQ's grids: scales as stored, orders of columns, less error than rounding to the nearest."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dsq.errors import InputError
from dsq.quant.gptq_layout import pack, unpack

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from dsq.quant.gptq import Quantized, Scheme, ordered, quantize, search  # noqa: E402

N_IN, N_OUT = 192, 96


def problem(seed: int = 0, n_in: int = N_IN, n_out: int = N_OUT) -> tuple:
    """A weight (n_out, n_in), and the Hessian of correlated inputs of very different sizes."""
    rng = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n_in, n_in, generator=rng) * torch.logspace(-1, 1, n_in)
    inputs = torch.randn(4 * n_in, n_in, generator=rng) @ (mixed + 3 * torch.eye(n_in))
    inputs = inputs[:, torch.randperm(n_in, generator=rng)]
    weight = torch.randn(n_out, n_in, generator=rng) / n_in**0.5
    return weight, inputs.T @ inputs / len(inputs)


def solved(weight, hessian, scheme: Scheme, form: str = "gptq", damp: float = 0.01) -> Quantized:
    order = ordered(hessian, "w", act_order=scheme.act_order, damp=damp)
    return quantize("w", weight, torch.zeros_like(weight), order, scheme, form)


def schemes() -> list[Scheme]:
    orders = [(False, False), (True, False), (True, True)]
    return [
        Scheme(bits, group, sym, *order)
        for bits, group, sym, order in itertools.product(
            (2, 3, 4, 8), (32, 64, -1), (True, False), orders
        )
    ]


@pytest.mark.parametrize("scheme", schemes(), ids=str)
def test_what_is_packed_is_what_was_reckoned_with(scheme: Scheme) -> None:
    """Through the stored bytes, f16 scales and all: bit for bit the values that errors are of."""
    weight, hessian = problem()
    found = solved(weight, hessian, scheme)
    tensor = unpack(pack(found.tensor), scheme.bits)
    np.testing.assert_array_equal(tensor.dequantized(), found.values.numpy())
    assert (tensor.scales != 0).all()
    assert np.isfinite(tensor.scales).all()
    missed = weight - found.values
    error = ((missed @ hessian) * missed).sum(1)
    damped = 0.01 * hessian.diagonal().mean() * missed.square().sum(1)
    torch.testing.assert_close(found.error, error + damped, rtol=2e-3, atol=1e-6)
    assert found.error.sum() < 0.9 * found.nearest.sum()


@pytest.mark.parametrize("act_order", [False, True])
def test_groups_lie_where_g_idx_says(act_order: bool) -> None:
    weight, hessian = problem()
    in_order = np.arange(N_IN) // 64
    static = solved(weight, hessian, Scheme(4, 64, act_order=act_order, static_groups=act_order))
    np.testing.assert_array_equal(static.tensor.g_idx, in_order)
    if act_order:
        found = solved(weight, hessian, Scheme(4, 64, act_order=True)).tensor.g_idx
        largest_first = np.argsort(-hessian.diagonal().numpy(), kind="stable")
        np.testing.assert_array_equal(found[largest_first], in_order)


def test_act_order_does_not_care_how_inputs_are_numbered() -> None:
    weight, hessian = problem()
    shuffled = torch.randperm(N_IN, generator=torch.Generator().manual_seed(1))
    scheme = Scheme(3, 32, act_order=True)
    plain = solved(weight, hessian, scheme)
    other = solved(weight[:, shuffled], hessian[shuffled][:, shuffled], scheme)
    torch.testing.assert_close(other.values, plain.values[:, shuffled], rtol=0, atol=0)


def test_what_is_missing_is_made_up_for() -> None:
    """At 8 bits the answer is the least squares one, which solves (W' - W) H = missing."""
    weight, hessian = problem()
    missing = 0.1 * torch.randn(N_OUT, N_IN, generator=torch.Generator().manual_seed(2))
    order = ordered(hessian, "w", act_order=True, damp=0.0)
    found = quantize("w", weight, missing, order, Scheme(8, 32, act_order=True))
    wanted = weight + torch.linalg.solve(hessian.double(), missing.double().T).T.float()
    assert (found.values - wanted).norm() < 0.02 * (wanted - weight).norm()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_weights_on_a_grid_are_found_again(bits: int, sym: bool) -> None:
    rng = torch.Generator().manual_seed(bits)
    top, zero = (1 << bits) - 1, (1 << (bits - 1)) if sym else 1
    codes = torch.randint(0, top + 1, (64, 500), generator=rng).float()
    codes[0], codes[1] = 0, top  # both ends are used
    scale = torch.rand(500, generator=rng).add(0.1).half().float()
    weights = (codes - zero) * scale
    found_scale, found_zero = search(weights, bits, sym=sym)
    found = weights.div(found_scale).add(found_zero).round().clamp(0, top)
    torch.testing.assert_close((found - found_zero) * found_scale, weights)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_beats_the_largest_weight_on_top(bits: int) -> None:
    """AutoGPTQ's and GPTQModel's default grid: from minus to plus the largest."""
    weights = torch.randn(64, 2000, generator=torch.Generator().manual_seed(0))
    top, middle = (1 << bits) - 1, 1 << (bits - 1)

    def error(scale, zero) -> float:
        codes = weights.div(scale).add(zero).round().clamp(0, top)
        return float((weights - (codes - zero) * scale).square().sum())

    theirs = error(2 * weights.abs().amax(0) / top, torch.tensor(float(middle)))
    assert error(*search(weights, bits, sym=True)) < 0.85 * theirs
    assert error(*search(weights, bits, sym=False)) < 0.85 * theirs


def test_zero_points_do_not_wrap_in_format_gptq() -> None:
    """A group of nothing but positive weights would have zero 0, which GPTQModel's carry spoils."""
    weights = torch.rand(64, 50, generator=torch.Generator().manual_seed(0)) + 0.5
    assert search(weights, 4, sym=False)[1].min() == 0
    hessian = torch.eye(64)
    for form, least in (("gptq", 1), ("gptq_v2", 0)):
        found = solved(weights.T.contiguous(), hessian, Scheme(4, 32, sym=False), form)
        assert found.tensor.zeros.min() == least


def test_dead_channels_and_empty_groups() -> None:
    weight, hessian = problem()
    weight[:, :64] = 0  # groups of nothing
    dead = [70, 71, 150]
    hessian[dead] = 0
    hessian[:, dead] = 0
    for scheme in (Scheme(4, 64), Scheme(4, 64, act_order=True), Scheme(4, 64, sym=False)):
        order = ordered(hessian, "w", act_order=scheme.act_order)
        assert order.under.dead == len(dead)
        found = solved(weight, hessian, scheme)
        assert bool(found.values.isfinite().all())
        np.testing.assert_array_equal(found.tensor.dequantized(), found.values.numpy())
        if not scheme.act_order:
            assert not found.values[:, :64].any()
            assert (found.values - weight)[:, dead].abs().max() < 0.04  # half a step


def test_damp_grows_until_the_hessian_is_definite() -> None:
    inputs = torch.randn(8, N_IN, generator=torch.Generator().manual_seed(0))
    order = ordered(inputs.T @ inputs / 8, "w", act_order=True, damp=0.0)
    assert order.under.damp > 0


def test_a_short_last_group() -> None:
    weight, hessian = problem(n_in=160)
    scheme = Scheme(4, 64)
    with pytest.raises(InputError, match=r"q: groups of 64 do not divide its 160 inputs.*32 or -1"):
        scheme.check("q", 160, N_OUT, allow_ragged=False)
    scheme.check("q", 160, N_OUT, allow_ragged=True)
    found = solved(weight, hessian, scheme)
    assert found.tensor.scales.shape == (3, N_OUT)
    np.testing.assert_array_equal(found.tensor.dequantized(), found.values.numpy())


@pytest.mark.parametrize(("value", "what"), [(float("nan"), "nan"), (1e6, "1e")])
def test_weights_that_f16_cannot_hold_are_named(value: float, what: str) -> None:
    weight, hessian = problem()
    weight[3, 5] = value
    with pytest.raises(InputError, match=f"w: its compensated weights go up to {what}"):
        solved(weight, hessian, Scheme(4, 64))


def test_tiny_weights_keep_a_scale() -> None:
    weight, hessian = problem()
    found = solved(weight * 1e-9, hessian, Scheme(4, 64))
    assert (found.tensor.scales != 0).all()


@pytest.mark.parametrize(("bits", "group"), [(5, 128), (4, 48), (4, 0)])
def test_settings_that_gptq_has_not(bits: int, group: int) -> None:
    with pytest.raises(InputError, match="--bits 5" if bits == 5 else f"--group-size {group}"):
        Scheme(bits, group)
