"""Moments of the output's gradient at every linear's output, layer by layer and backwards.

How much the model's predictions change when a matrix does, to second order. At token t let
p_t = softmax(z_t) be the model's own prediction, and let ỹ_t be drawn from it, not from the text.
Then L = Σ_t log p_t(ỹ_t), a sum over all tokens of a window, has E[∂L/∂θ ∂L/∂θᵀ] = Σ_t F_t with
KL(p_t ‖ p_t after a small step δ) ≈ ½ δᵀ F_t δ: the cross terms vanish, because a draw from p_t has
an expected score of zero (the Fisher matrix; Martens, arXiv 1412.1193). With y = W x at each
token, ∂L/∂W = Σ_s ∂L/∂y_s x_sᵀ. Keep its diagonal over tokens s and over rows o, and take the
gradient as independent of x (as K-FAC does, arXiv 1503.05671): the mean divergence a token is

    KL ≈ ½ Σ_o g_o δw_o H δw_oᵀ,    g_o = E_s[(∂L/∂y_so)²],    H = E_s[x_s x_sᵀ].

On tiny-coder this is 0.9 to 1.4 times the measured KL for most matrices. It reads low for `attn_v`,
0.4 to 0.8: attention adds up errors at many tokens, which the diagonal over tokens leaves out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dsq.runtime.decoder import Decoder, Weights

if TYPE_CHECKING:
    from torch import Tensor

    from dsq.convert.spec import ModelSpec

_HEAD_TOKENS = 512  # logits of so many tokens at once


class RecordingDecoder(Decoder):
    """A decoder that keeps each linear's output of the last call in `outputs`."""

    def __init__(self, spec: ModelSpec, n_ctx: int, device: str) -> None:
        super().__init__(spec, n_ctx, device)
        self.outputs: dict[str, Tensor] = {}

    def linear(self, weights: Weights, name: str, inputs: Tensor) -> Tensor:
        output = super().linear(weights, name, inputs)
        self.outputs[name] = output
        return output


def sampled_labels(probabilities: Tensor, uniform: npt.NDArray[np.float64]) -> Tensor:
    """One token drawn a row of (tokens, n_vocab), by one number of [0, 1) each: (tokens)."""
    import torch

    total = probabilities.double().cumsum(-1)
    targets = torch.from_numpy(uniform).to(total)[:, None] * total[:, -1:]
    found: Tensor = torch.searchsorted(total, targets, right=True)[:, 0]
    return found.clamp_(max=probabilities.shape[-1] - 1)


def head_gradient(
    graph: Decoder, norm: Tensor, head: Tensor, hidden: Tensor, uniform: npt.NDArray[np.float64]
) -> tuple[Tensor, Tensor]:
    """∂L/∂hidden for `hidden` (windows, n_ctx, n_embd), and Σ (∂L/∂z_o)² over tokens (n_vocab).

    `uniform` (windows, n_ctx) draws the labels. ∂L/∂z is the label's one-hot vector less p.
    """
    import torch

    rows, draws = hidden.flatten(0, 1), uniform.reshape(-1)
    gradient = torch.empty_like(rows)
    squares = torch.zeros(len(head), dtype=torch.float64, device=rows.device)
    for start in range(0, len(rows), _HEAD_TOKENS):
        part = rows[start : start + _HEAD_TOKENS].detach().requires_grad_()
        normed = graph.output_in(norm, part)
        by_logits = (normed.detach() @ head.T).softmax(-1)
        labels = sampled_labels(by_logits, draws[start : start + len(part)])
        by_logits.neg_()[torch.arange(len(part), device=rows.device), labels] += 1
        squares += by_logits.square().sum(0)
        (by_hidden,) = torch.autograd.grad(normed, part, by_logits @ head)
        gradient[start : start + len(part)] = by_hidden
    return gradient.reshape(hidden.shape), squares


def layer_gradient(
    graph: RecordingDecoder, weights: Weights, hidden: Tensor, gradient: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """One layer backwards: from ∂L/∂(its output) to ∂L/∂hidden, and the gradient's squares.

    The squares are summed over tokens, (n_out) by the linear's name in `STAGES`.
    """
    import torch

    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad():
        out = graph.layer(weights, hidden)
    by_hidden, *by_outputs = torch.autograd.grad(out, [hidden, *graph.outputs.values()], gradient)
    squares = {
        name: values.flatten(0, 1).square().sum(0)
        for name, values in zip(graph.outputs, by_outputs, strict=True)
    }
    graph.outputs.clear()
    return by_hidden, squares
