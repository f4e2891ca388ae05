"""The model that is distilled: what is learned of it, and one layer's weights at a time.

Learned are the relative changes of block scales, minima and norm gains; embedding and head are left
as they are. The graph is cut between the layers, so that only one layer's part is in memory while
its gradients are computed, unless all of them fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dsq.convert.spec import ModelSpec
from dsq.quant.scheme import BF16, F32, GgmlType
from dsq.runtime.decoder import Decoder

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class Tunable(Protocol):
    """A quantized matrix with numbers that can be learned."""

    @property
    def parameters(self) -> list[Tensor]:
        """What Adam changes: relative changes, 0 at first."""

    def weight(self) -> Tensor:
        """(n_out, n_in) float32 as it would be stored, differentiable in `parameters`."""


class Gain:
    """A norm's gains, times what is learned, as a file of type `stored` holds them."""

    def __init__(self, values: Tensor, stored: GgmlType = F32) -> None:
        import torch

        self._values, self._stored = values, stored
        self.change = torch.zeros_like(values, requires_grad=True)

    def weight(self) -> Tensor:
        gain = self._values * (1 + self.change)
        # Rounding is passed straight through in the backward pass.
        return gain + (as_stored(gain, self._stored) - gain).detach()


def as_stored(values: Tensor, to: GgmlType) -> Tensor:
    """Float32 values as f32, f16 or bf16 holds them."""
    if to is F32:
        return values
    return (values.bfloat16() if to is BF16 else values.half()).float()


@dataclass(frozen=True, eq=False)
class Parts:
    """Every tensor of a model by its Hugging Face name, as one of three."""

    spec: ModelSpec
    tunables: Mapping[str, Tunable]
    gains: Mapping[str, Gain]
    fixed: Mapping[str, Tensor]


class Student:
    """The quantized model: what is learned, and one layer's weights at a time."""

    def __init__(
        self, parts: Parts, graph: Decoder, batch_tokens: int, keep_bytes: int | None
    ) -> None:
        """`keep_bytes`: what activations may take in all; None: half of the free memory."""
        self.spec, self.graph = parts.spec, graph
        self.tunables, self.gains, self._fixed = parts.tunables, parts.gains, parts.fixed
        limit = _free_bytes() // 2 if keep_bytes is None else keep_bytes
        self.keep = self._activation_bytes(batch_tokens) <= limit

    def _activation_bytes(self, n_tokens: int) -> int:
        """What autograd keeps of all layers: activations and unpacked weights, in float32."""
        spec = self.spec
        a_token = 12 * spec.n_embd + 6 * spec.n_ff
        weights = sum(t.weight().numel() for t in self._layer_tunables(0))
        return 4 * spec.n_layer * (n_tokens * a_token + weights)

    def _layer_tunables(self, layer: int) -> Iterator[Tunable]:
        prefix = f"model.layers.{layer}."
        return (t for name, t in self.tunables.items() if name.startswith(prefix))

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Adam's parameter groups."""
        scales = [p for t in self.tunables.values() for p in t.parameters]
        return [{"params": [*scales, *(g.change for g in self.gains.values())], "lr": lr}]

    def parameters(self) -> list[Tensor]:
        return [p for group in self.groups(0) for p in group["params"]]

    def embed(self, ids: Tensor) -> Tensor:
        return self._fixed[EMBEDDING][ids]

    def layer(self, i: int, hidden: Tensor) -> Tensor:
        prefix = f"model.layers.{i}."
        parts: dict[str, Any] = {**self.tunables, **self.gains}
        weights = {
            name.removeprefix(prefix): part.weight()
            for name, part in parts.items()
            if name.startswith(prefix)
        }
        weights |= {
            name.removeprefix(prefix): values
            for name, values in self._fixed.items()
            if name.startswith(prefix)
        }
        return self.graph.layer(weights, hidden)

    def head(self) -> tuple[Tensor, Tensor]:
        """Final norm's gains, and the head's matrix."""
        return self.gains[NORM].weight(), self._fixed[EMBEDDING if self.spec.tied else HEAD]

    def snapshot(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters()]

    def restore(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters(), values, strict=True):
            parameter.data.copy_(value)

    def forward(self, ids: Tensor) -> Tensor:
        """The last hidden state, nothing kept."""
        hidden = self.embed(ids)
        for i in range(self.spec.n_layer):
            hidden = self.layer(i, hidden)
        return hidden

    def backward(self, ids: Tensor, loss: Callable[[Tensor], tuple[float, Tensor]]) -> float:
        """Accumulate gradients; `loss` takes the last hidden state, gives its value and gradient.

        Between the layers the graph is cut, so that one layer's part is freed before the next.
        """
        import torch

        inputs: list[Tensor] = []
        outputs: list[Tensor | None] = []
        hidden = self.embed(ids)
        for i in range(self.spec.n_layer):
            inputs.append(hidden.detach().requires_grad_())
            with torch.set_grad_enabled(self.keep):
                hidden = self.layer(i, inputs[-1])
            outputs.append(hidden if self.keep else None)
            hidden = hidden.detach()
        value, gradient = loss(hidden)
        for i in reversed(range(self.spec.n_layer)):
            kept = outputs.pop()
            with torch.enable_grad():
                output = self.layer(i, inputs[-1]) if kept is None else kept
            torch.autograd.backward(output, gradient)
            below = inputs.pop().grad
            assert below is not None, "the layer's input requires a gradient"
            gradient = below
        return value


def _free_bytes() -> int:
    """Memory that can be had without swapping (Linux); else 2 GiB."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 2 << 30
