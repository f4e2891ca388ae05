"""Second moments of what a model's linears read: mean squares, and E[x xᵀ]."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dsq.runtime.decoder import STAGES, Decoder, Weights

if TYPE_CHECKING:
    from torch import Tensor

    from dsq.convert.spec import ModelSpec

F32Array = npt.NDArray[np.float32]

# Only the upper triangle of x xᵀ is computed, in strips: with 8 of them 9/16 of the products. A
# strip narrower than this would keep the matrix units waiting.
_STRIPS, _LEAST_STRIP = 8, 256

_FIRST = {linears[0]: stage for stage, linears in STAGES.items()}  # of those that share an input


class WatchedDecoder(Decoder):
    """A decoder that shows each stage's input to `see(stage, input)` as it passes."""

    def __init__(
        self, spec: ModelSpec, n_ctx: int, device: str, see: Callable[[str, Tensor], None]
    ) -> None:
        super().__init__(spec, n_ctx, device)
        self._see = see

    def linear(self, weights: Weights, name: str, inputs: Tensor) -> Tensor:
        if name in _FIRST:
            self._see(_FIRST[name], inputs)
        return super().linear(weights, name, inputs)


class Moments:
    """Sums over tokens for one input of `n` channels.

    Squares are summed in float32 within a batch and in float64 over batches; products in float32,
    batch after batch by one matrix product into the sum.
    """

    def __init__(self, n: int, device: str, *, hessian: bool) -> None:
        import torch

        self._squares = torch.zeros(n, dtype=torch.float64, device=device)
        self._products = torch.zeros(n, n, device=device) if hessian else None
        self._count = 0
        width = max(_LEAST_STRIP, -(-n // _STRIPS))
        self._strips = [(i, min(i + width, n)) for i in range(0, n, width)]

    def add(self, inputs: Tensor) -> None:
        """Add the tokens of `inputs` (…, n)."""
        rows = inputs.flatten(0, -2)
        self._count += len(rows)
        self._squares += rows.square().sum(0)
        if self._products is not None:
            for begin, end in self._strips:
                strip = self._products[begin:end, begin:]
                strip.addmm_(rows[:, begin:end].T, rows[:, begin:])

    @property
    def finite(self) -> bool:
        return bool(self._squares.isfinite().all())

    def mean_sq(self) -> F32Array:
        """(n): the mean over all tokens."""
        values: F32Array = (self._squares / self._count).float().cpu().numpy()
        return values

    def hessian(self) -> F32Array | None:
        """(n, n), exactly symmetric; None if none was asked for. The sums are used up."""
        products = self._products
        if products is None:
            return None
        products /= self._count
        for begin, end in self._strips:
            square = products[begin:end, begin:end]
            square.copy_(square.triu() + square.triu(1).T)
            products[end:, begin:end] = products[begin:end, end:].T
        values: F32Array = products.cpu().numpy()
        return values
