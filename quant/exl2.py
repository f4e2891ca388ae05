"""One EXL2 matrix: error feedback in groups of several bit widths, under an act-order permutation.

A scheme says how many bits the packed rows have, from the top. The scales of a group are chosen on
weights that already make up for the rows before it: 4 bits a column, squared, of one f16 number.
See `dsq.quant.exl2_layout` for how that is stored, `dsq.quant.solver` for the feedback.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil
from typing import TYPE_CHECKING

import numpy as np

from dsq.errors import InputError
from dsq.quant.exl2_layout import COLUMNS, EXL2_BITS, Exl2Tensor
from dsq.quant.solver import DAMP, Factor, aim, factor, feedback

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 32  # exllamav2's kernels take so many rows at once; 16 at 2 bits

# exllamav2 takes a group's largest scale / 256 in f16 first. Below f16's normal numbers that is a
# multiple of 2^-24, so only such scales are chosen, and nothing is lost there.
_LEAST_SCALE = 2.0**-24
_F16_MAX = 65504.0

# Codes that are tried below the first that clips nothing: the fewer the bits, the more it pays.
_TRIED = {2: 8, 3: 5, 4: 4, 5: 3, 6: 3, 8: 2}
_SHIFTS = (
    1.0,
    0.97,
    0.94,
    1.02,
    1.04,
    1.07,
    1.1,
)  # of a group's largest scale; codes are 1.13 apart


@dataclass(frozen=True)
class Run:
    """`rows` packed rows of `bits` each, in groups of `group`; only the last group may be short."""

    bits: int
    rows: int
    group: int


@dataclass(frozen=True)
class Scheme:
    """The runs of one matrix, from the top: bits never increase."""

    runs: tuple[Run, ...]

    def to_json(self) -> list[list[int]]:
        """[bits, rows, group] of each run."""
        return [[run.bits, run.rows, run.group] for run in self.runs]

    @classmethod
    def from_json(cls, runs: Sequence[Sequence[int]]) -> Scheme:
        return cls(tuple(Run(int(bits), int(rows), int(group)) for bits, rows, group in runs))

    @property
    def n_in(self) -> int:
        return sum(run.rows for run in self.runs)

    def groups(self) -> list[tuple[int, int]]:
        """Bits and rows of every group."""
        return [
            (run.bits, min(run.group, run.rows - start))
            for run in self.runs
            for start in range(0, run.rows, run.group)
        ]

    def total_bits(self, n_out: int, *, bias: bool = False) -> int:
        """What the matrix takes, as exllamav2 counts it: scales, groups, permutation, bias."""
        columns = padded(n_out)
        n_groups = len(self.groups())
        codes = sum(run.bits * run.rows for run in self.runs) * columns
        about_groups = n_groups * (16 + 32 + 4 * columns)  # q_scale_max, q_groups, q_scale
        return codes + about_groups + 32 * self.n_in + (16 * columns if bias else 0)

    def check(self, name: str, n_in: int) -> None:
        """Raises InputError naming `name` for what exllamav2's kernels cannot read."""
        if n_in % ROWS:
            raise InputError(
                f"{name}: {n_in} inputs are no multiple of {ROWS}, which EXL2 needs; convert to "
                "GGUF instead"
            )
        if self.n_in != n_in or any(run.rows < 1 for run in self.runs):
            raise InputError(f"{name}: a scheme of {self.n_in} rows for {n_in} inputs")
        bits = [run.bits for run in self.runs]
        if set(bits) - set(EXL2_BITS) or bits != sorted(bits, reverse=True):
            raise InputError(f"{name}: bits {bits}; give 8, 6, 5, 4, 3, 2, never increasing")
        for run in self.runs:
            least = 16 if run.bits == 2 else ROWS
            if run.group < least or run.group % least:
                raise InputError(
                    f"{name}: groups of {run.group} rows at {run.bits} bits; give multiples of "
                    f"{least}"
                )
        for run in self.runs[:-1]:
            if run.rows % run.group:
                raise InputError(
                    f"{name}: {run.rows} rows of {run.bits} bits in groups of {run.group}; only "
                    "the last group of a matrix may be short"
                )


def padded(n_out: int) -> int:
    """Columns as exllamav2 stores them."""
    return -(-n_out // COLUMNS) * COLUMNS


def scheme_of_shares(
    n_in: int, bits: Sequence[int], shares: Sequence[float], groups: Sequence[int]
) -> Scheme:
    """exllamav2's way to say it: shares of the rows, rounded up to whole groups."""
    runs: list[Run] = []
    left = n_in
    for bit, share, group in zip(bits, shares, groups, strict=True):
        rows = min(ceil(min(n_in * share, left) / group) * group, left)
        left -= rows
        if rows:
            runs.append(Run(bit, rows, group))
    if left or not runs:
        raise InputError(f"shares {list(shares)} leave {left} of {n_in} rows without bits")
    return Scheme(tuple(runs))


# One matrix


@dataclass(frozen=True, eq=False)
class Order:
    """Packed row p is input perm[p]; `under` factorizes the Hessian in that order."""

    perm: Tensor
    under: Factor


def ordered(hessian: Tensor, name: str, damp: float = DAMP) -> Order:
    """Act-order: by descending diagonal of the Hessian (n_in, n_in). Raises as `solver.factor`."""
    import torch

    perm = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    return Order(perm, factor(hessian[perm][:, perm], name, damp))


@dataclass(frozen=True, eq=False)
class Quantized:
    """A matrix as stored, its values (n_out, n_in), and tr((W - Q) H (W - Q)ᵀ) a row (n_out)."""

    tensor: Exl2Tensor
    values: Tensor
    error: Tensor


def quantize(
    name: str, weight: Tensor, order: Order, scheme: Scheme, missing: Tensor | None = None
) -> Quantized:
    """Quantize `weight` (n_out, n_in), float32; W is what it aims at, see `solver.aim`.

    `missing` (n_out, n_in): what its output lacks, None for nothing. Raises InputError naming
    `name` for weights that are NaN or Inf or too large, and for a scheme that does not fit.
    """
    import torch

    scheme.check(name, weight.shape[1])
    target = weight[:, order.perm]
    if missing is not None:
        target = aim(target, missing[:, order.perm], order.under)
    largest = float(target.abs().max())
    if not largest <= _F16_MAX:  # NaN too
        raise InputError(
            f"{name}: its compensated weights go up to {largest:g}, which f16 scales cannot hold; "
            "calibrate on other text, or give more --damp"
        )
    solve = _Solve(target.T.contiguous(), order.under, scheme)
    codes, packed, error = solve.run()
    invperm = torch.argsort(order.perm)
    groups = scheme.groups()
    tensor = Exl2Tensor(
        codes=codes.cpu().numpy(),
        group_bits=np.array([bits for bits, _ in groups]),
        group_rows=np.array([rows for _, rows in groups]),
        scale_codes=torch.cat(solve.scale_codes).cpu().numpy(),
        scale_max=torch.cat(solve.scale_max).cpu().numpy(),
        invperm=invperm.to(torch.int32).cpu().numpy(),
    )
    return Quantized(tensor, packed[invperm].T.contiguous(), error)


class _Solve:
    """The runs of a scheme in turn; neighbours with groups of one size are solved as one part."""

    def __init__(self, weight: Tensor, under: Factor, scheme: Scheme) -> None:
        self.weight, self.under, self.scheme = weight, under, scheme  # (n_in, n_out)
        self.scale_codes: list[Tensor] = []
        self.scale_max: list[Tensor] = []
        self.bits = [bits for bits, rows in scheme.groups() for _ in range(rows)]

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes and values (n_in, n_out) in packed order, and the error of each column."""
        import torch

        codes = torch.empty(self.weight.shape, dtype=torch.uint8, device=self.weight.device)
        values = torch.empty_like(self.weight)
        error = torch.zeros_like(self.weight[0])
        for begin, end, group in self.parts():
            part = slice(begin, end)
            upper = self.under.upper[part, part]
            target = self.weight[part]
            if begin:
                # As in solver.aim: weights whose output makes up for the errors of the parts before
                missed = self.weight[:begin] - values[:begin]
                owed = self.under.upper[:begin, part].T @ missed
                target = target + torch.linalg.solve_triangular(upper.T, owed, upper=False)
            below = Factor(upper, self.under.damp, self.under.dead)
            self.begin, self.cost = begin, below.cost
            found = feedback(target, below, self.choose, group)
            codes[part], values[part] = found.codes, found.values
            error += found.error
        return codes, values, error

    def parts(self) -> Iterator[tuple[int, int, int]]:
        """First row, end, and group size."""
        begin = 0
        for group, runs in groupby(self.scheme.runs, key=lambda run: run.group):
            end = begin + sum(run.rows for run in runs)
            yield begin, end, group
            begin = end

    def choose(self, begin: int, wanted: Tensor) -> _Columns:
        bits = self.bits[self.begin + begin]
        cost = self.cost[begin : begin + len(wanted)]
        codes, largest = find_scales(wanted[None], cost[None], bits)
        self.scale_codes.append(codes)
        self.scale_max.append(largest)
        return _Columns(scales(codes, largest)[0], bits)


class _Columns:
    """The rows of one group: whole numbers times a scale (n_out)."""

    def __init__(self, scale: Tensor, bits: int) -> None:
        self.scale, self.zero = scale, 1 << (bits - 1)

    def round(self, i: int, values: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        level = (values / self.scale).round_().clamp_(-self.zero, self.zero - 1)
        return (level + self.zero).to(torch.uint8), level * self.scale


# Scales


def scales(codes: Tensor, largest: Tensor) -> Tensor:
    """The scales (groups, n_out) of 4-bit codes and f16 `largest` (groups), as exllamav2 has them.

    It works in f16: see `exl2_layout.scale_values`.
    """
    import torch

    square = (codes.to(torch.float16) + 1).square()
    return (square * (largest * 2.0**-8)[:, None]).float()


def find_scales(
    weight: Tensor, cost: Tensor, bits: int, *, shifts: Sequence[float] = _SHIFTS
) -> tuple[Tensor, Tensor]:
    """Codes (groups, n_out), uint8, and the largest scales (groups), f16, of least error.

    `weight` is (groups, rows, n_out), `cost` (groups, rows) weighs the squared errors. `shifts`:
    the largest scales that are tried, as shares of the best single one.
    """
    import torch

    search = _Search(weight, cost, bits)
    zero = 1 << (bits - 1)
    widest = torch.maximum(weight.amax(1) / (zero - 1), weight.amin(1) / -zero)
    codes, largest, _ = search.best(widest, widest.amax(1), _TRIED[bits])
    found = scales(codes, largest)
    best = search.best(found, found.amax(1) * shifts[0], 2)
    for shift in shifts[1:]:
        best = _better(best, search.best(found, found.amax(1) * shift, 2))
    return _better(best, search.refit(*best[:2]))[:2]


_Found = tuple["Tensor", "Tensor", "Tensor"]  # codes (groups, n_out), largest and error (groups)


def _better(one: _Found, other: _Found) -> _Found:
    import torch

    less = other[2] < one[2]
    return (
        torch.where(less[:, None], other[0], one[0]),
        torch.where(less, other[1], one[1]),
        torch.where(less, other[2], one[2]),
    )


class _Search:
    """Errors of the weights of some groups under scales that are tried."""

    def __init__(self, weight: Tensor, cost: Tensor, bits: int) -> None:
        import torch

        self.weight, self.cost = weight, cost[:, None]  # (groups, 1, rows)
        self.zero = 1 << (bits - 1)
        self.buffer = torch.empty_like(weight)

    def best(self, wanted: Tensor, largest: Tensor, down: int) -> _Found:
        """The best codes under `largest` (groups), from those of the scales `wanted` down."""
        import torch

        kept = self.stored(largest)
        real = (wanted / kept.float()[:, None]).sqrt() * 16 - 1
        start = real.ceil().clamp(0, 15)
        least = torch.full_like(start, torch.inf)
        codes = torch.zeros_like(start, dtype=torch.uint8)
        for step in range(down + 1):
            tried = (start - step).clamp(0, 15).to(torch.uint8)
            error = self.errors(scales(tried, kept))
            less = error < least
            codes = torch.where(less, tried, codes)
            least = torch.where(less, error, least)
        return codes, kept, least.sum(1)

    def refit(self, codes: Tensor, largest: Tensor) -> _Found:
        """The least squares answer for `largest`, the rounded weights as they are."""
        import torch

        scale = scales(codes, largest)
        unit = scale / largest.float()[:, None]
        level = self.levels(scale).mul_(unit[:, None])
        above = (self.cost @ (level * self.weight)).sum((1, 2))
        below = (self.cost @ level.square()).sum((1, 2))
        kept = self.stored(torch.where(below > 0, above / below, largest.float()))
        return codes, kept, self.errors(scales(codes, kept)).sum(1)

    def errors(self, scale: Tensor) -> Tensor:
        """Σ cost · error² of each column (groups, n_out)."""
        rounded = self.levels(scale).mul_(scale[:, None])
        return (self.cost @ rounded.sub_(self.weight).square_())[:, 0]

    def levels(self, scale: Tensor) -> Tensor:
        import torch

        level = torch.div(self.weight, scale[:, None], out=self.buffer)
        return level.round_().clamp_(-self.zero, self.zero - 1)

    @staticmethod
    def stored(largest: Tensor) -> Tensor:
        """As f16, and so that its 256th part is an f16 above zero too."""
        import torch

        part = (largest * 2.0**-8).clamp(_LEAST_SCALE, _F16_MAX * 2.0**-8).to(torch.float16)
        return (part.float() * 256).clamp(max=_F16_MAX).to(torch.float16)
