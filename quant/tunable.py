"""A quantized tensor whose continuous numbers can be learned: its scales and minima.

The codes stay, so format, size and speed do. What is learned is a relative change of each run's
scale and minimum; the forward pass uses what the type can store (`with_scales`), so the weights
that are trained on are the weights of the file. Rounding to the stored scales is passed straight
through in the backward pass (Bengio et al., arXiv 1308.3432).

With value = scale · level - minimum, the gradients of the changes a, b in scale · (1 + a) and
minimum · (1 + b) are Σ G · scale · level and -Σ G · minimum over the run. Only packed bytes are
kept between the steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dsq.quant import ggml
from dsq.quant.grids import F32Array, U8Array, grid
from dsq.quant.scales import with_scales
from dsq.quant.scheme import GgmlType

if TYPE_CHECKING:
    from torch import Tensor

_PRODUCT = 1 << 16  # weights


class Tunable:
    """One tensor (n_out, n_in). Raises UnsupportedError for a type without a grid."""

    def __init__(self, data: U8Array, of: GgmlType, n_in: int, device: str = "cpu") -> None:
        """`data` is (n_out, row_bytes)."""
        import torch

        self.type, self.n_in, self.device = of, n_in, device
        self._grid = grid(of)
        self._data = np.ascontiguousarray(data)
        self._scale, self._minimum = self._grid.unpack(self._data)
        # (n_blocks, runs) each: relative changes
        self.scale = torch.zeros(self._scale.shape, device=device, requires_grad=True)
        self.minimum = (
            None
            if self._minimum is None
            else torch.zeros(self._minimum.shape, device=device, requires_grad=True)
        )

    @property
    def parameters(self) -> list[Tensor]:
        return [self.scale] if self.minimum is None else [self.scale, self.minimum]

    def weight(self) -> Tensor:
        """(n_out, n_in) float32, differentiable in `parameters`."""
        weight: Tensor = _function().apply(self, *self.parameters)
        return weight

    def packed(self) -> U8Array:
        """(n_out, row_bytes): the tensor with its present scales and minima."""
        scale = _changed(self._scale, self.scale)
        minimum = None
        if self._minimum is not None and self.minimum is not None:
            minimum = _changed(self._minimum, self.minimum)
        return with_scales(self._grid, self._data, scale, minimum)

    def gradients(self, packed: U8Array, weight: Tensor, by_weight: Tensor) -> list[Tensor]:
        """What `parameters` get of ∂L/∂weight; `weight` (n_out, n_in) is what `packed` holds."""
        import torch

        run = self._grid.run
        # Some rows at a time: a product that is as large as the matrix would leave the cache.
        size = max(1, _PRODUCT // self.n_in)
        parts = [slice(i, i + size) for i in range(0, len(weight), size)]
        by_scale = torch.cat(
            [(by_weight[part] * weight[part]).reshape(-1, run).sum(1) for part in parts]
        )
        if self.minimum is None:
            return [by_scale.reshape(self.scale.shape)]
        _, minimum = self._grid.unpack(packed)
        m = torch.from_numpy(np.asarray(minimum).reshape(-1)).to(self.device)
        by_minimum = by_weight.reshape(-1, run).sum(1) * m
        # values hold - minimum: what is left of it must not count for the scale.
        by_scale = by_scale + by_minimum
        return [by_scale.reshape(self.scale.shape), -by_minimum.reshape(self.scale.shape)]

    def dequantized(self, packed: U8Array) -> Tensor:
        import torch

        weight = torch.empty((len(packed), self.n_in))
        ggml.dequantize_into(packed.reshape(-1), self.type, weight.numpy())
        return weight.to(self.device)


def _changed(values: F32Array, change: Tensor) -> F32Array:
    factors = 1 + change.detach().cpu().numpy()
    changed: F32Array = values * factors
    return changed


_made: list[Any] = []


def _function() -> Any:
    """The autograd function; torch is imported only where something is learned."""
    if not _made:
        import torch

        class Weight(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, tensor: Tunable, *parameters: Tensor) -> Tensor:
                ctx.tensor, ctx.packed = tensor, tensor.packed()
                weight = tensor.dequantized(ctx.packed)
                ctx.save_for_backward(weight)  # which the product that reads it keeps anyway
                return weight

            @staticmethod
            def backward(ctx: Any, *by_weight: Tensor) -> Any:
                return None, *ctx.tensor.gradients(ctx.packed, *ctx.saved_tensors, by_weight[0])

        _made.append(Weight)
    return _made[0]
