"""A GPTQ or EXL2 directory in transformers: its codes stay packed, and each matrix is dequantized
when a product asks for it.

The graph and the KV cache are transformers'; only where a matrix comes from is ours. What is packed
stays in the mapped files, so memory is the quantized size and a tile of one matrix, which is small
enough for the cache: its codes are shifted out of the words, scaled and multiplied before the next.
The numbers are those of the same model unpacked to float32: nothing is rounded but sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from dsq.convert.checkpoint import HfCheckpoint
from dsq.convert.packed import PackedLinears, PackedRun
from dsq.errors import DsqError
from dsq.quant import ggml
from dsq.quant.bitstream import codes_per_run, n_words

if TYPE_CHECKING:
    from torch import Tensor

_ROWS, _COLUMNS = 256, 2048  # of a tile: a megabyte for each of two cores
_SCATTERED = 8  # rows of one group in a row, on the average: fewer are scaled one by one

Tile = tuple[slice, slice, "Tensor"]  # inputs, outputs, weights (inputs, outputs)


class Matrix(Protocol):
    """One matrix of a checkpoint, read from the files whenever it is asked for."""

    n_in: int
    n_out: int

    @property
    def order(self) -> Tensor | None:
        """The input of each row of the tiles; None: they are in order."""

    def tiles(self) -> Iterator[Tile]:
        """All of it in float32; a tile is valid until the next."""


class Dense:
    """A matrix that is stored in a float type."""

    order = None

    def __init__(self, checkpoint: HfCheckpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name
        self._info = checkpoint.tensors[name]
        self.n_out, self.n_in = self._info.shape

    def tiles(self) -> Iterator[Tile]:
        import torch

        step = max(1, _ROWS * _COLUMNS // self.n_in)
        types = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
        stored = self._stored()
        read = torch.empty(step, self.n_in, dtype=types[self._info.type.name])
        values = torch.empty(step, self.n_in)
        for start in range(0, self.n_out, step):
            columns = slice(start, min(start + step, self.n_out))
            n = columns.stop - start
            read[:n].view(torch.uint8).numpy()[:] = stored[columns]
            yield slice(None), columns, values[:n].copy_(read[:n]).T

    def some(self, ids: Tensor) -> Tensor:
        """Its rows `ids`: (…, n_in) float32."""
        import torch

        which, inverse = np.unique(ids.numpy().reshape(-1), return_inverse=True)
        found = torch.empty(len(which), self.n_in)
        raw = np.ascontiguousarray(self._stored()[which])
        ggml.dequantize_into(raw.reshape(-1), self._info.type, found.numpy())
        return found[torch.from_numpy(inverse.reshape(ids.shape))]

    def _stored(self) -> npt.NDArray[np.uint8]:
        return self._checkpoint.data(self._name).reshape(self.n_out, -1)


@dataclass(frozen=True)
class _Span:
    """Consecutive rows of one width, and their words. `groups`: first row, end, and group of each
    stretch of rows that share their scales."""

    rows: slice
    bits: int
    words: slice
    groups: list[tuple[int, int, int]]


class Packed:
    """A GPTQ or EXL2 matrix."""

    def __init__(self, packed: PackedLinears, name: str) -> None:
        self._packed, self._name = packed, name
        self.n_out, self.n_in = packed.tensors[name].shape

    @cached_property
    def _layout(self) -> tuple[list[_Span], Tensor | None]:
        """Raises InputError naming the matrix for damaged contents."""
        import torch

        layout = self._packed.layout(self._name)
        order = None if layout.order is None else torch.from_numpy(layout.order)
        return [span for run in layout.runs for span in _spans(run, layout.groups)], order

    @property
    def order(self) -> Tensor | None:
        return self._layout[1]

    def tiles(self) -> Iterator[Tile]:
        spans, _ = self._layout
        words, zeros, scales = self._packed.contents(self._name)
        buffers = _Buffers()
        for span in spans:
            n = span.rows.stop - span.rows.start
            for start in range(0, self.n_out, _COLUMNS):
                columns = slice(start, min(start + _COLUMNS, self.n_out))
                tile = buffers.codes(words[span.words, columns], span.bits, n)
                _scale(tile, span.groups, zeros[:, columns], scales[:, columns])
                yield span.rows, columns, tile


def _spans(run: PackedRun, groups: npt.NDArray[np.integer[Any]]) -> Iterator[_Span]:
    """A run in pieces of `_ROWS`, which fill whole words at any width."""
    for start in range(run.rows.start, run.rows.stop, _ROWS):
        rows = slice(start, min(start + _ROWS, run.rows.stop))
        first = run.words.start + (start - run.rows.start) * run.bits // 32
        words = slice(first, first + n_words(rows.stop - start, run.bits))
        own = groups[rows]
        borders = [0, *(np.flatnonzero(np.diff(own)) + 1).tolist(), len(own)]
        yield _Span(rows, run.bits, words, [(a, b, int(own[a])) for a, b in pairwise(borders)])


def _scale(
    tile: Tensor,
    groups: Sequence[tuple[int, int, int]],
    zeros: npt.NDArray[Any],
    scales: npt.NDArray[Any],
) -> None:
    """Codes become weights, where they are."""
    import torch

    parts: list[tuple[slice, Any]]
    if len(groups) * _SCATTERED > len(tile):
        which = np.repeat([g for *_, g in groups], [end - start for start, end, _ in groups])
        parts = [(slice(None), which)]
    else:
        parts = [(slice(start, end), group) for start, end, group in groups]
    for rows, own in parts:
        tile[rows].sub_(torch.from_numpy(zeros[own].astype(np.float32)))
        tile[rows].mul_(torch.from_numpy(scales[own].astype(np.float32)))


class _Buffers:
    """What a tile is made in. torch's memory, not numpy's: it is aligned alike in every run."""

    def __init__(self) -> None:
        import torch

        self.words = torch.empty(_ROWS * _COLUMNS // 4, dtype=torch.int32)
        self.shifted = torch.empty(_ROWS * _COLUMNS // 4, dtype=torch.int32)
        self.tile = torch.empty(_ROWS * _COLUMNS)

    def codes(self, words: npt.NDArray[np.int32], bits: int, n: int) -> Tensor:
        """(rows, columns) of words → (n, columns) of codes, as floats."""
        import torch

        columns, run = words.shape[1], codes_per_run(bits)
        per_run, runs = run * bits // 32, -(-n // run)
        stream = self.words[: runs * per_run * columns].view(runs * per_run, columns)
        stream[: len(words)].numpy()[:] = words
        stream[len(words) :] = 0
        stream = stream.view(runs, per_run, columns)
        shifted = self.shifted[: runs * columns].view(runs, columns)
        tile = self.tile[: runs * run * columns].view(runs, run, columns)
        for i in range(run):
            word, shift = divmod(i * bits, 32)
            torch.bitwise_right_shift(stream[:, word], shift, out=shifted)
            if shift + bits > 32:  # the code goes on in the next word
                shifted &= (1 << (32 - shift)) - 1  # the sign came in from the left
                shifted |= stream[:, word + 1] << (32 - shift)
            shifted &= (1 << bits) - 1
            tile[:, i] = shifted
        return tile.view(-1, columns)[:n]


def load_packed(checkpoint: HfCheckpoint, config: Any) -> Any:
    """A LlamaForCausalLM in float32 whose matrices are `Matrix`; `config` is `llama_config`'s.

    Takes no longer than opening the files. Raises InputError, at first use, for damaged contents.
    """
    import torch
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    linear, embedding = _modules()
    checkpoint.check_tied()
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(torch.float32)
    model.set_attn_implementation("sdpa")
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its frequencies are no weights
    for name, info in checkpoint.tensors.items():
        module = name.rpartition(".")[0]
        if len(info.shape) == 2:
            bias = getattr(model.get_submodule(module), "bias", None)
            if module == "model.embed_tokens":
                model.set_submodule(module, embedding(Dense(checkpoint, name)))
            elif checkpoint.packed is not None and name in checkpoint.packed.tensors:
                model.set_submodule(module, linear(Packed(checkpoint.packed, name), bias))
            else:
                model.set_submodule(module, linear(Dense(checkpoint, name), bias))
    for name, info in checkpoint.tensors.items():
        module, _, kind = name.rpartition(".")
        if len(info.shape) == 1:
            value = torch.empty(info.shape)
            ggml.dequantize_into(checkpoint.data(name), info.type, value.numpy())
            setattr(model.get_submodule(module), kind, torch.nn.Parameter(value, False))
    if checkpoint.spec.tied:
        model.lm_head = linear(Dense(checkpoint, "model.embed_tokens.weight"))
    left = [name for name, value in model.named_parameters() if value.is_meta]
    if left:
        raise DsqError(
            f"{checkpoint.path}: transformers' Llama has {left[0]}, which the files lack; use "
            f"transformers 5.23"
        )
    return model.eval()


def _modules() -> tuple[Any, Any]:
    """The two kinds of module; they need torch to be defined."""
    import torch

    class Linear(torch.nn.Module):
        bias: Any

        def __init__(self, matrix: Matrix, bias: Any = None) -> None:
            super().__init__()
            self.matrix = matrix
            self.register_parameter("bias", bias)

        def forward(self, inputs: Tensor) -> Tensor:
            order, n_out = self.matrix.order, self.matrix.n_out
            flat = inputs.reshape(-1, self.matrix.n_in)
            if order is not None:
                flat = flat[:, order]
            out = flat.new_zeros(len(flat), n_out)
            for rows, columns, tile in self.matrix.tiles():
                out[:, columns].addmm_(flat[:, rows], tile)
            if self.bias is not None:
                out += self.bias
            return out.view(*inputs.shape[:-1], n_out)

    class Embedding(torch.nn.Module):
        def __init__(self, matrix: Dense) -> None:
            super().__init__()
            self.matrix = matrix

        def forward(self, ids: Tensor) -> Tensor:
            return self.matrix.some(ids)

    return Linear, Embedding
