"""Learned scales: exact weights, and the gradients that autograd finds by itself."""

from __future__ import annotations

import numpy as np
import pytest

from dsq.quant import ggml
from dsq.quant.grids import GRIDS
from dsq.quant.scheme import ggml_type
from dsq.quant.tunable import Tunable

pytestmark = pytest.mark.torch

N_OUT, N_IN = 6, 512


def tunable(name: str) -> tuple[Tunable, np.ndarray]:
    values = np.random.default_rng(3).standard_normal((N_OUT, N_IN)).astype(np.float32)
    data = ggml.quantize(values, ggml_type(name))
    return Tunable(data, ggml_type(name), N_IN), data


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_untouched_it_is_the_stored_tensor(name: str) -> None:
    tensor, data = tunable(name)
    np.testing.assert_array_equal(
        tensor.weight().detach().numpy(), ggml.dequantize(data, ggml_type(name), N_IN)
    )
    np.testing.assert_array_equal(tensor.packed(), data)


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_gradients(name: str) -> None:
    """Against autograd through scale · (1 + a) · level - minimum · (1 + b), written out."""
    import torch

    tensor, data = tunable(name)
    by_weight = torch.from_numpy(
        np.random.default_rng(4).standard_normal((N_OUT, N_IN)).astype(np.float32)
    )
    (tensor.weight() * by_weight).sum().backward()

    grid = GRIDS[name]
    scale, minimum = grid.unpack(data)
    levels = torch.from_numpy(grid.levels[grid.codes(data)]).reshape(*scale.shape, grid.run)
    a = torch.zeros(scale.shape, requires_grad=True)
    b = torch.zeros(scale.shape, requires_grad=True)
    values = levels * (torch.from_numpy(scale) * (1 + a))[..., None]
    if minimum is not None:
        values = values - (torch.from_numpy(minimum) * (1 + b))[..., None]
    (values.reshape(N_OUT, N_IN) * by_weight).sum().backward()
    for parameter, wanted in zip(tensor.parameters, (a, b), strict=False):
        torch.testing.assert_close(parameter.grad, wanted.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["q4_0", "q4_k", "q3_k"])
def test_what_is_trained_on_is_what_is_stored(name: str) -> None:
    import torch

    tensor, _ = tunable(name)
    with torch.no_grad():
        for parameter in tensor.parameters:
            parameter += 0.03 * torch.randn(parameter.shape, generator=torch.manual_seed(0))
    np.testing.assert_array_equal(
        tensor.weight().detach().numpy(),
        ggml.dequantize(tensor.packed(), ggml_type(name), N_IN),
    )
