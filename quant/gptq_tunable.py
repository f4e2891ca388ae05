"""A GPTQ matrix whose scales can be learned; its codes, zero points and groups stay.

What is learned is a relative change of each scale; the forward pass uses what f16 holds of it, so
the weights that are trained on are those of the file. The rounding is passed straight through in
the backward pass (Bengio et al., arXiv 1308.3432). Between the passes only the packed codes are
kept.

With weight = (code - zero) · scale, the gradient of the change a in scale · (1 + a) is
Σ G · weight over the group, up to the factor 1 + a, which stays near 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsq.quant.bitstream import unpack_words
from dsq.quant.gptq import as_f16
from dsq.quant.gptq_layout import Format, unpack_zeros

if TYPE_CHECKING:
    from torch import Tensor


class GptqTunable:
    """One matrix (n_out, n_in). `parts` are its packed tensors, as by `gptq_layout.pack`."""

    def __init__(
        self,
        parts: Mapping[str, npt.NDArray[Any]],
        bits: int,
        checkpoint_format: Format = "gptq",
        device: str = "cpu",
    ) -> None:
        import torch

        self.bits, self.device = bits, device
        self._words = parts["qweight"]
        self._g_idx = torch.from_numpy(parts["g_idx"].astype(np.int64)).to(device)
        scales = parts["scales"]
        self._scales = torch.from_numpy(scales.astype(np.float32)).to(device)
        zeros = unpack_zeros(parts["qzeros"], bits, scales.shape[1], checkpoint_format)
        self._zeros = torch.from_numpy(zeros.astype(np.float32)).to(device)
        # (n_groups, n_out): relative changes
        self.change = torch.zeros_like(self._scales, requires_grad=True)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.change]

    def weight(self) -> Tensor:
        """(n_out, n_in) float32, differentiable in `parameters`."""
        weight: Tensor = _function().apply(self, self.change)
        return weight

    def scales(self) -> Tensor:
        """(n_groups, n_out), values of f16: what is to be stored."""
        return as_f16(self._scales * (1 + self.change.detach()))

    def dequantized(self) -> Tensor:
        """(n_out, n_in): the weights under the present scales."""
        import torch

        codes = torch.from_numpy(unpack_words(self._words, self.bits, len(self._g_idx)))
        weight = codes.to(self.device).float()
        weight.sub_(self._zeros[self._g_idx]).mul_(self.scales()[self._g_idx])
        return weight.T

    def gradient(self, by_weight: Tensor, weight: Tensor) -> Tensor:
        """What `change` gets of ∂L/∂weight (n_out, n_in)."""
        import torch

        # A product, not index_add: the same sums in the same order on every device.
        member = torch.zeros(len(self._scales), len(self._g_idx), device=self.device)
        member.scatter_(0, self._g_idx[None], 1.0)
        return member @ (by_weight * weight).T


_made: list[Any] = []


def _function() -> Any:
    """The autograd function; torch is imported only where something is learned."""
    if not _made:
        import torch

        class Weight(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, tensor: GptqTunable, change: Tensor) -> Tensor:
                weight = tensor.dequantized()
                ctx.tensor = tensor
                ctx.save_for_backward(weight)  # which the product that reads it keeps anyway
                return weight

            @staticmethod
            def backward(ctx: Any, *by_weight: Tensor) -> Any:
                return None, ctx.tensor.gradient(by_weight[0], *ctx.saved_tensors)

        _made.append(Weight)
    return _made[0]
