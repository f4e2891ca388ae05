"""Two ways through the model side by side: the original's, and that of the weights as stored.

A quantized layer reads what the quantized layers before it give. Its Hessian is taken of that; and
what its output lacks is measured against the original's way, so that it can make up for errors made
before it, as far as its input tells of them. One layer's weights are in memory, hidden states are
on disk, and each matrix is multiplied once a way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dsq.convert.spec import ModelSpec
from dsq.runtime.calibration.borders import Border
from dsq.runtime.calibration.moments import Moments
from dsq.runtime.decoder import ATTN_IN, ATTN_OUT, FFN_IN, FFN_OUT, STAGES, Decoder

if TYPE_CHECKING:
    from torch import Tensor

BATCH_TOKENS = 2048  # what passes a layer at once


@dataclass(frozen=True, eq=False)
class Seen:
    """What a stage's input x was on the stored way, and what the original's way had instead.

    `hessian` is E[x xᵀ] (n_in, n_in). Where a matrix adds to the hidden state (o and down),
    `output` is E[y xᵀ] (n_embd, n_in), y what it should give for the sum to be the original's;
    elsewhere `drift` is E[(x' - x) xᵀ] (n_in, n_in), x' the original's input.
    """

    hessian: Tensor
    drift: Tensor | None = None
    output: Tensor | None = None

    def missing(self, weight: Tensor) -> Tensor:
        """E[m xᵀ] (n_out, n_in), m what the output of `weight` (n_out, n_in) lacks."""
        if self.output is not None:
            return self.output - weight @ self.hessian
        assert self.drift is not None
        return weight @ self.drift


class TwoWays(AbstractContextManager["TwoWays"]):
    """The ways of `ids` (windows, n_ctx) through a model of `spec`; a context with files in it.

    `embed`; then for each layer: `enter`, for each stage `see` and `put` what its matrices are
    stored as, then `leave`. Raises OSError.

    A layer's input is left as it is until the layer after it begins. So a run that was killed can
    go on: `layer` is the one whose input lies in `folder`, after as many calls of `leave`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        ids: npt.NDArray[np.int32],
        folder: Path,
        device: str,
        *,
        layer: int = 0,
    ) -> None:
        self.spec, self.ids, self.layer = spec, ids, layer
        self.graph = Decoder(spec, ids.shape[1], device)
        self.original: dict[str, Tensor] = {}
        self.stored: dict[str, Tensor] = {}
        self._files = ExitStack()
        try:
            # Hidden states at a layer's input and at its output, by turns.
            self._theirs, self._ours = (
                [
                    self._border(folder / f"{way}-{i}", spec.n_embd, layer == 0 or i != layer % 2)
                    for i in (0, 1)
                ]
                for way in ("original", "stored")
            )
            self._inner = {
                ATTN_OUT: self._border(folder / "mixed", spec.n_head * spec.head_dim, True),
                FFN_OUT: self._border(folder / "gated", spec.n_ff, True),
            }
        except BaseException:
            self._files.close()
            raise

    @staticmethod
    def disk_bytes(spec: ModelSpec, n_tokens: int) -> int:
        return 4 * n_tokens * (4 * spec.n_embd + spec.n_head * spec.head_dim + spec.n_ff)

    def embed(self, original: Tensor, stored: Tensor) -> None:
        """Begin with the rows of two embeddings (n_vocab, n_embd)."""
        import torch

        for start, n in self._batches():
            ids = torch.from_numpy(self.ids[start : start + n].astype(np.int64))
            self._theirs[0].write(start, original[ids])
            self._ours[0].write(start, stored[ids])

    def enter(self, weights: dict[str, Tensor]) -> None:
        """Take the weights of the next layer, by their names inside it."""
        self.original, self.stored = weights, dict(weights)

    def put(self, name: str, values: Tensor) -> None:
        """From now on the stored way uses `values` for the matrix of that name."""
        self.stored[f"{name}.weight"] = values

    def see(self, stage: str) -> Seen:
        """Run both ways up to a stage; the matrices of the stages before must have been put."""
        import torch

        device = self.graph.device
        width = {ATTN_OUT: self.spec.n_head * self.spec.head_dim, FFN_OUT: self.spec.n_ff}
        n_in = width.get(stage, self.spec.n_embd)
        moments = Moments(n_in, device, hessian=True)
        products = torch.zeros(self.spec.n_embd, n_in, device=device)
        with torch.inference_mode():
            for start, n in self._batches():
                x, other = self._pass(stage, start, n)
                moments.add(x)
                products.addmm_(other.flatten(0, -2).T, x.flatten(0, -2))
        products /= self.ids.size
        hessian = moments.hessian()
        assert hessian is not None
        return Seen(
            torch.from_numpy(hessian).to(device),
            **({"output": products} if stage in width else {"drift": products}),
        )

    def leave(self) -> None:
        """The stored way's last step; the original's is done."""
        import torch

        ours = self._ours[self._out]
        with torch.inference_mode():
            for start, n in self._batches():
                inner = self._read(self._inner[FFN_OUT], start, n)
                hidden = self._read(ours, start, n)
                ours.write(start, self.graph.add_ffn(self.stored, hidden, inner))
        self.layer += 1

    def sync(self) -> None:
        """The input of the layer that comes next survives a power cut."""
        self._theirs[self._in].sync()
        self._ours[self._in].sync()

    @property
    def _in(self) -> int:
        return self.layer % 2

    @property
    def _out(self) -> int:
        return 1 - self._in

    def _pass(self, stage: str, start: int, n: int) -> tuple[Tensor, Tensor]:
        """The stored way's input, and what goes with it into `Seen`."""
        graph = self.graph
        at_theirs = self._in if stage in (ATTN_IN, ATTN_OUT) else self._out
        at_ours = self._out if stage == FFN_OUT else self._in
        theirs = self._read(self._theirs[at_theirs], start, n)
        ours = self._read(self._ours[at_ours], start, n)
        if stage == ATTN_IN:
            x = graph.attn_in(self.stored, ours)
            return x, graph.attn_in(self.original, theirs) - x
        if stage == ATTN_OUT:
            x = graph.mixed(self.stored, ours)
            theirs = graph.add_attention(self.original, theirs, graph.mixed(self.original, theirs))
        elif stage == FFN_IN:
            inner = self._read(self._inner[ATTN_OUT], start, n)
            ours = graph.add_attention(self.stored, ours, inner)
            self._ours[self._out].write(start, ours)
            x = graph.ffn_in(self.stored, ours)
            return x, graph.ffn_in(self.original, theirs) - x
        else:
            x = graph.gated(self.stored, ours)
            theirs = graph.add_ffn(self.original, theirs, graph.gated(self.original, theirs))
        self._inner[stage].write(start, x)
        self._theirs[self._out].write(start, theirs)
        bias = self.stored.get(f"{STAGES[stage][0]}.bias")
        wanted = theirs - ours
        return x, wanted if bias is None else wanted - bias

    def _read(self, border: Border, start: int, n: int) -> Tensor:
        return border.read(start, n).to(self.graph.device)

    def _batches(self) -> Iterator[tuple[int, int]]:
        """First window and number of windows."""
        size = max(1, BATCH_TOKENS // self.ids.shape[1])
        for start in range(0, len(self.ids), size):
            yield start, min(size, len(self.ids) - start)

    def _border(self, path: Path, width: int, create: bool) -> Border:
        shape = (len(self.ids), self.ids.shape[1], width)
        return self._files.enter_context(Border(path, shape, create=create))

    def __exit__(self, *_: object) -> None:
        self._files.close()
