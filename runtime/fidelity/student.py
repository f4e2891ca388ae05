"""The model that is distilled: what is learned of it, and one layer's weights at a time.

Learned are the relative changes of block scales, minima and norm gains; embedding and head are left
as they are. The graph is cut between the layers, so that only one layer's part is in memory while
its gradients are computed, unless all of them fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsq.convert.checkpoint import GgufCheckpoint
from dsq.convert.names import expected_tensors, gguf_name, permuted_heads
from dsq.convert.tensor_plan import half_split_rows
from dsq.errors import InputError
from dsq.quant.grids import GRIDS
from dsq.quant.tunable import Tunable
from dsq.runtime.decoder import Decoder, read_tensor

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class Gain:
    """A norm's gains, times what is learned."""

    def __init__(self, values: Tensor) -> None:
        import torch

        self._values = values
        self.change = torch.zeros_like(values, requires_grad=True)

    def weight(self) -> Tensor:
        return self._values * (1 + self.change)


class Student:
    """The quantized model: what is learned, and one layer's weights at a time."""

    def __init__(
        self, file: GgufCheckpoint, graph: Decoder, batch_tokens: int, keep_bytes: int | None
    ) -> None:
        """`keep_bytes`: what activations may take in all; None: half of the free memory."""
        self.spec, self.graph = file.spec, graph
        self.tunables: dict[str, Tunable] = {}
        self.gains: dict[str, Gain] = {}
        self._fixed: dict[str, Tensor] = {}
        for name, shape in expected_tensors(self.spec).items():
            info = file.tensors[gguf_name(name)]
            if len(shape) == 2 and info.type.name in GRIDS and name not in (EMBEDDING, HEAD):
                data = file.data(info.name).reshape(shape[0], -1)
                heads = permuted_heads(info.name, self.spec)
                rows = data[half_split_rows(len(data), heads)] if heads else data
                self.tunables[name] = Tunable(rows, info.type, shape[1], graph.device)
            elif name.endswith("norm.weight"):
                self.gains[name] = Gain(read_tensor(file, name, graph.device))
            else:
                self._fixed[name] = read_tensor(file, name, graph.device)
        if not self.tunables:
            raise InputError(
                f"{file.path}: no tensor of a type whose scales dsq can tune ({', '.join(GRIDS)})"
            )
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
