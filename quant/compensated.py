"""Error feedback on the grids of ggml's block types: an ordinary q4_0 with less error in its layer.

The scales of each block are chosen by ggml's own search, on weights that already make up for the
errors of the columns before; the codes by `dsq.quant.solver`. A type whose codes name whole groups
of weights (iq2, iq3, iq1, …) is left to ggml, under the Hessian's diagonal as importance matrix.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dsq.errors import InputError
from dsq.quant import ggml
from dsq.quant.grids import GRIDS, Grid, grid
from dsq.quant.scheme import GgmlType
from dsq.quant.solver import Factor, feedback

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK_VALUES = 1 << 14
_F16_MAX = 65504.0  # of a block's scale, and so, with room to spare, of its weights


@dataclass(frozen=True, eq=False)
class Compensated:
    """A quantized weight: `data` (n_out, row_bytes), and what it holds, `values` (n_out, n_in).

    `error` is tr((W - Q) H (W - Q)ᵀ) for each row (n_out), `nearest` the same had every weight gone
    to the nearest value of its grid; None where there is no grid.
    """

    data: npt.NDArray[np.uint8]
    values: Tensor
    error: Tensor
    nearest: Tensor | None


def compensated(
    name: str, weight: Tensor, under: Factor, to: GgmlType, importance: Tensor, pool: Executor
) -> Compensated:
    """Quantize `weight` (n_out, n_in), float32, to `to` under a factorized Hessian.

    `importance` (n_in) weighs the errors in the search for scales; the pool's threads share it.
    Raises InputError naming `name` for weights that are NaN or Inf, or too large for the type.
    """
    ggml.library().ggml_quantize_init(to.id)
    weights = importance.float().cpu().numpy().copy()
    if to.name in GRIDS:
        return _Solve(name, weight, under, to, weights, pool).run()
    data = _quantize(name, weight.cpu().contiguous().numpy(), to, weights, pool)
    values = _dequantize(data, to, weight)
    return Compensated(data, values, _error(weight - values, under), None)


def _error(missed: Tensor, under: Factor) -> Tensor:
    """tr(M H Mᵀ), row by row (n_out), of what a quantized weight missed (n_out, n_in)."""
    return (missed @ under.upper).square().sum(1)


class _Solve:
    """Error feedback in groups of a block, or superblock."""

    def __init__(
        self,
        name: str,
        weight: Tensor,
        under: Factor,
        to: GgmlType,
        importance: npt.NDArray[np.float32],
        pool: Executor,
    ) -> None:
        import torch

        self.name, self.under, self.to, self.pool = name, under, to, pool
        self.grid, self.importance = grid(to), importance
        self.weight = weight.T.contiguous()  # (n_in, n_out)
        self.blocks: list[npt.NDArray[np.uint8]] = []  # of each group: (n_out, block_bytes)
        self.rounded = torch.empty_like(self.weight)  # to the nearest

    def run(self) -> Compensated:
        size = self.to.block_size
        found = feedback(self.weight, self.under, self.choose, size)
        codes = found.codes.T.cpu().numpy()  # (n_out, n_in)
        packed = [
            self.grid.pack(data, codes[:, i * size : (i + 1) * size])
            for i, data in enumerate(self.blocks)
        ]
        nearest = _error((self.weight - self.rounded).T, self.under)
        return Compensated(np.hstack(packed), found.values.T, found.error, nearest)

    def choose(self, begin: int, wanted: Tensor) -> GridColumns:
        """ggml's scales for a group's weights (columns, n_out) as they have become."""
        end = begin + len(wanted)
        rows = wanted.T.contiguous().cpu().numpy()
        data = _quantize(self.name, rows, self.to, self.importance[begin:end], self.pool)
        self.blocks.append(data)
        columns = GridColumns(self.grid, data, wanted)
        self.rounded[begin:end] = columns.nearest(self.weight[begin:end])
        return columns


class GridColumns:
    """The columns of one block a row, under the scales in `data` (n_out, block_bytes)."""

    def __init__(self, of: Grid, data: npt.NDArray[np.uint8], like: Tensor) -> None:
        import torch

        scale, minimum = of.unpack(data)  # (n_out, runs)
        self.scale = torch.from_numpy(scale.T.copy()).to(like.device)  # (runs, n_out)
        self.minimum = (
            None if minimum is None else torch.from_numpy(minimum.T.copy()).to(like.device)
        )
        # Under a scale of zero every code means the same.
        self.divisor = torch.where(self.scale == 0, torch.inf, self.scale)
        self.levels = torch.from_numpy(of.levels).to(like.device)
        self.between = (self.levels[1:] + self.levels[:-1]) / 2
        self.even = bool((self.levels.diff() == 1).all())
        self.first, self.last = float(of.levels[0]), float(of.levels[-1])
        self.run = of.run

    def round(self, i: int, values: Tensor) -> tuple[Tensor, Tensor]:
        run = i // self.run
        minimum = None if self.minimum is None else self.minimum[run]
        return self._round(values, self.scale[run], self.divisor[run], minimum)

    def nearest(self, values: Tensor) -> Tensor:
        """Values (columns, n_out) of the whole block."""
        runs = values.reshape(len(self.scale), self.run, -1)  # (runs, run, n_out)
        minimum = None if self.minimum is None else self.minimum[:, None]
        found = self._round(runs, self.scale[:, None], self.divisor[:, None], minimum)[1]
        return found.flatten(0, 1)

    def _round(
        self, values: Tensor, scale: Tensor, divisor: Tensor, minimum: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        import torch

        steps = (values if minimum is None else values + minimum) / divisor
        if self.even:
            level = steps.round_().clamp_(self.first, self.last)
            code = (level - self.first).to(torch.uint8)
        else:
            index = torch.bucketize(steps, self.between)
            code, level = index.to(torch.uint8), self.levels[index]
        found = level * scale
        return code, found if minimum is None else found - minimum


def _quantize(
    name: str,
    rows: npt.NDArray[np.float32],
    to: GgmlType,
    importance: npt.NDArray[np.float32],
    pool: Executor,
) -> npt.NDArray[np.uint8]:
    """`ggml.quantize` by several threads. Raises InputError for what ggml would abort on."""
    largest = max(float(rows.max()), -float(rows.min()))
    if not largest <= _F16_MAX:  # NaN too
        raise InputError(
            f"{name}: its compensated weights go up to {largest:g}, which {to} cannot hold; "
            f"calibrate on other text, give more --damp, or use --method ggml"
        )
    out = np.empty((len(rows), to.row_bytes(rows.shape[1])), np.uint8)
    step = max(1, _CHUNK_VALUES // rows.shape[1])

    def part(start: int) -> None:
        stop = start + step
        ggml.quantize_into(rows[start:stop], to, out[start:stop], importance)

    for _ in pool.map(part, range(0, len(rows), step)):
        pass
    return out


def _dequantize(data: npt.NDArray[np.uint8], to: GgmlType, like: Tensor) -> Tensor:
    import torch

    values = torch.empty(like.shape)
    ggml.dequantize_into(data.reshape(-1), to, values.numpy())
    return values.to(like.device)
