"""Error feedback: against GPTQ as published, against plain rounding, and on bad Hessians."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import pytest

from dsq.errors import InputError
from dsq.quant import ggml
from dsq.quant.compensated import compensated
from dsq.quant.grids import GRIDS
from dsq.quant.scheme import BY_NAME
from dsq.quant.solver import aim, factor, feedback

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

N_IN, N_OUT = 512, 24


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as made:
        yield made


def problem(seed: int = 0, n_in: int = N_IN):
    """A weight, and the Hessian of inputs that are correlated and of unequal size."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((n_in // 4, n_in)) + 0.3 * rng.standard_normal((1, n_in))
    inputs = rng.standard_normal((3 * n_in, n_in // 4)) @ mix + rng.standard_normal(
        (3 * n_in, n_in)
    )
    inputs *= rng.lognormal(sigma=0.5, size=n_in)
    weight = rng.standard_normal((N_OUT, n_in)) * 0.05
    return torch.tensor(weight).float(), torch.tensor(inputs.T @ inputs / len(inputs)).float()


def layer_error(weight, quantized, hessian) -> float:
    missed = (weight - quantized).double()
    return float(((missed @ hessian.double()) * missed).sum())


class Uniform:
    """Whole numbers times a step, the same for all columns."""

    step = 0.02

    def round(self, i: int, values):
        code = (values / self.step).round()
        return (code + 128).to(torch.uint8), code * self.step


def gptq(weight, hessian, step: float):
    """Algorithm 1 of arXiv 2210.17323 with B = 1, in float64; returns whole numbers."""
    left = weight.double().clone()
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True)
    codes = torch.empty_like(left)
    for j in range(left.shape[1]):
        codes[:, j] = (left[:, j] / step).round()
        error = (left[:, j] - codes[:, j] * step) / inverse[j, j]
        left[:, j:] -= error[:, None] * inverse[j, j:]
    return codes


@pytest.mark.parametrize("group", [32, 100, 512])
def test_it_is_gptq(group: int) -> None:
    weight, hessian = problem()
    under = factor(hessian, "w", damp=0.01)
    found = feedback(weight.T.contiguous(), under, lambda begin, wanted: Uniform(), group)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(N_IN)
    theirs = gptq(weight, damped, Uniform.step)
    codes = found.codes.T.double() - 128
    # A tie or two may fall to the other side in float32, and takes the columns after it along.
    assert (codes != theirs).double().mean() < 0.005
    assert torch.equal(found.values, (found.codes.float() - 128) * Uniform.step)
    expected = layer_error(weight, found.values.T, damped)
    assert float(found.error.sum()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_less_error_than_ggml_alone_on_every_type(name: str, pool: Executor) -> None:
    weight, hessian = problem(1)
    to, importance = BY_NAME[name], hessian.diagonal().contiguous()
    found = compensated("w", weight, factor(hessian, "w"), to, importance, pool)
    stored = torch.from_numpy(ggml.dequantize(found.data, to, N_IN))
    assert torch.equal(stored, found.values)
    plain = ggml.quantize(weight.numpy(), to, importance.numpy())
    before = layer_error(weight, torch.from_numpy(ggml.dequantize(plain, to, N_IN)), hessian)
    assert layer_error(weight, stored, hessian) < 0.6 * before
    assert float(found.error.sum()) < 0.6 * float(found.nearest.sum())


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
def test_without_correlations_the_bytes_are_ggmls(name: str, pool: Executor) -> None:
    """These types round to the nearest on the scales as they are stored, in the end."""
    weight, hessian = problem(2)
    importance = hessian.diagonal().contiguous()
    diagonal = torch.diag(importance)
    found = compensated("w", weight, factor(diagonal, "w"), BY_NAME[name], importance, pool)
    plain = ggml.quantize(weight.numpy(), BY_NAME[name], importance.numpy())
    assert (found.data != plain).mean() < 1e-3  # exact ties: x / d here, x * (1 / d) there
    assert torch.allclose(found.error, found.nearest, rtol=1e-4)


def test_threads_do_not_change_a_byte() -> None:
    weight, hessian = problem(3)
    found = []
    for threads in (1, 3):
        with ThreadPoolExecutor(threads) as pool:
            under = factor(hessian, "w")
            data = compensated("w", weight, under, BY_NAME["q4_k"], under.cost, pool).data
            found.append(data)
    np.testing.assert_array_equal(*found)


def test_a_dead_channel_is_rounded_to_the_nearest(pool: Executor) -> None:
    weight, hessian = problem(4)
    hessian[7] = 0
    hessian[:, 7] = 0
    under = factor(hessian, "w")
    assert (under.dead, under.damp) == (1, 0.1)
    found = compensated("w", weight, under, BY_NAME["q8_0"], under.cost, pool)
    step = 0.05 * 5 / 127
    assert (found.values - weight)[:, 7].abs().max() < step


def test_no_activity_at_all_is_plain_rounding(pool: Executor) -> None:
    weight, _ = problem(5)
    under = factor(torch.zeros(N_IN, N_IN), "w")
    found = compensated("w", weight, under, BY_NAME["q4_k"], under.cost, pool)
    plain = ggml.quantize(weight.numpy(), BY_NAME["q4_k"], np.ones(N_IN, np.float32))
    np.testing.assert_array_equal(found.data, plain)


def test_a_singular_hessian_is_damped_until_it_is_definite() -> None:
    direction = torch.randn(N_IN, generator=torch.Generator().manual_seed(0))
    hessian = torch.outer(direction, direction)
    hessian -= 1e-3 * torch.eye(N_IN)  # rounding can do that
    hessian.fill_diagonal_(0.5)
    under = factor(hessian, "w", damp=0.01)
    assert under.damp > 0.01
    assert torch.isfinite(under.upper).all()
    assert factor(torch.eye(N_IN), "w", damp=0.0).damp == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_damaged_hessian_is_refused_by_name(bad: float) -> None:
    _, hessian = problem(6)
    hessian[3, 5] = hessian[5, 3] = bad
    with pytest.raises(InputError, match=r"blk\.3\.attn_q\.weight: its Hessian has values that"):
        factor(hessian, "blk.3.attn_q.weight")


def test_a_type_of_codebooks_is_left_to_ggml(pool: Executor) -> None:
    weight, hessian = problem(7)
    to, importance = BY_NAME["iq3_s"], hessian.diagonal().contiguous()
    found = compensated("w", weight, factor(hessian, "w", damp=0.0), to, importance, pool)
    np.testing.assert_array_equal(found.data, ggml.quantize(weight.numpy(), to, importance.numpy()))
    assert found.nearest is None
    expected = layer_error(weight, found.values, hessian)
    assert float(found.error.sum()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
@pytest.mark.parametrize("name", ["q4_0", "q2_k", "iq2_xs"])
def test_weights_that_cannot_be_stored_are_refused_by_name(
    name: str, bad: float, pool: Executor
) -> None:
    """ggml aborts the process on some of them."""
    weight, hessian = problem(8)
    weight[3, 300] = bad
    under = factor(hessian, "w")
    with pytest.raises(InputError, match=r"blk\.0: its compensated weights go up to"):
        compensated("blk.0", weight, under, BY_NAME[name], under.cost, pool)


def test_the_aim_is_the_least_squares_answer() -> None:
    """A weight aimed at another's output is that weight, if the input tells of all of it."""
    weight, hessian = problem(9)
    other, _ = problem(10)
    under = factor(hessian, "w", damp=0.0)
    missing = (other - weight) @ hessian
    assert torch.allclose(aim(weight, missing, under), other, atol=1e-3)
