"""Which bits for which rows of which matrix: candidate schemes, their errors, and the choice.

With H = R Rᵀ, R upper triangular, error feedback leaves an error of Σ_j R_jj² |w'_j - q_j|² (see
`dsq.quant.solver`), and how far w'_j lies from its grid hardly depends on what was fed back. So the
error of any scheme is a sum over groups of rows of what each loses when it is rounded plainly: one
table, of every group in every width, gives them all. A matrix's candidates are the best ways to cut
its rows into runs, for a ladder of prices a bit; the choice among them is an integer program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsq.errors import DsqError, InputError
from dsq.quant.exl2 import Order, Run, Scheme, find_scales, scales
from dsq.quant.exl2_layout import EXL2_BITS

if TYPE_CHECKING:
    from torch import Tensor

F64Array = npt.NDArray[np.float64]

GROUPS = (32, 64, 128)
TOLERANCE = 0.02  # bits a weight
_WIDTHS = tuple(sorted(EXL2_BITS, reverse=True))
_SAMPLE = 128  # columns that a table is made of, at most
_PRICES = 64
_MOST = 40  # candidates of a matrix


@dataclass(frozen=True)
class Option:
    """Schemes for one matrix, or for some that are chosen together, by name.

    `total_bits` as exllamav2 counts them; `error` adds up over a model.
    """

    schemes: Mapping[str, Scheme]
    total_bits: int
    error: float

    def to_json(self) -> dict[str, Any]:
        schemes = {name: scheme.to_json() for name, scheme in self.schemes.items()}
        return {"schemes": schemes, "total_bits": self.total_bits, "error": self.error}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Option:
        """Raises KeyError, TypeError or ValueError for what `to_json` did not make."""
        schemes = {name: Scheme.from_json(runs) for name, runs in content["schemes"].items()}
        return cls(schemes, int(content["total_bits"]), float(content["error"]))


# Candidates


def candidates(
    name: str, weight: Tensor, order: Order, weights: Tensor, *, bias: bool
) -> list[Option]:
    """The candidates of one matrix, by size; see `candidates_of`.

    `weight` (n_out, n_in); `weights` (n_out): what a unit of a row's error costs the output. Of a
    large matrix a seeded sample of rows is measured.
    """
    import torch

    n_out, n_in = weight.shape
    rows = torch.arange(n_out)
    if n_out > _SAMPLE:
        drawn = np.random.default_rng(0).choice(n_out, _SAMPLE, replace=False)
        rows = torch.from_numpy(np.sort(drawn))
    rows = rows.to(weight.device)
    sample = weight[rows][:, order.perm].T.contiguous()
    share = weights[rows] * (n_out / len(rows))
    tables = {g: _table(sample, order.under.cost, share, g) for g in group_sizes(n_in)}
    return candidates_of(name, (n_out, n_in), tables, bias=bias)


def candidates_of(
    name: str, shape: tuple[int, int], tables: Mapping[int, F64Array], *, bias: bool
) -> list[Option]:
    """The candidates of a matrix (n_out, n_in) by size, from the errors (groups, widths) of its
    groups at every width, widest first, for each size of group.

    A larger one has less error, but for the largest: `extremes` are always among them.
    """
    n_out, n_in = shape
    found: list[Option] = []
    for group, table in tables.items():
        for bits in best_widths(table, _sizes(n_in, group)):
            scheme = _scheme(n_in, group, bits)
            error = sum(float(table[g, _WIDTHS.index(b)]) for g, b in enumerate(bits))
            found.append(Option({name: scheme}, scheme.total_bits(n_out, bias=bias), error))
    best = _frontier(found)
    largest = max(found, key=lambda o: (o.total_bits, -o.error))
    if best[-1].total_bits < largest.total_bits:
        best.append(largest)
    return _thinned(best)


def extremes(n_in: int, n_out: int, *, bias: bool) -> tuple[int, int]:
    """`total_bits` of the smallest candidate of a matrix of that shape, and of the largest."""
    found = [
        _scheme(n_in, group, [bits] * len(_sizes(n_in, group))).total_bits(n_out, bias=bias)
        for group in group_sizes(n_in)
        for bits in (_WIDTHS[0], _WIDTHS[-1])
    ]
    return min(found), max(found)


def group_sizes(n_in: int) -> list[int]:
    """The sizes of group that are tried for rows of `n_in`."""
    return [group for group in GROUPS if group == GROUPS[0] or group < 2 * n_in]


def _sizes(n_in: int, group: int) -> npt.NDArray[np.int64]:
    starts = np.arange(0, n_in, group, dtype=np.int64)
    sizes: npt.NDArray[np.int64] = np.minimum(group, n_in - starts)
    return sizes


def _table(weight: Tensor, cost: Tensor, share: Tensor, group: int) -> F64Array:
    """The error (groups, widths) of every group of rows at every width, rounded plainly."""
    whole = len(weight) // group * group
    parts = [_errors(weight[:whole], cost[:whole], share, group)] if whole else []
    if whole < len(weight):
        parts.append(_errors(weight[whole:], cost[whole:], share, len(weight) - whole))
    return np.concatenate(parts)


def _errors(weight: Tensor, cost: Tensor, share: Tensor, group: int) -> F64Array:
    groups = weight.reshape(-1, group, weight.shape[1])
    costs = cost.reshape(-1, group)
    columns = []
    for bits in _WIDTHS:
        codes, largest = find_scales(groups, costs, bits, shifts=(1.0,))
        scale = scales(codes, largest)[:, None]
        zero = 1 << (bits - 1)
        rounded = (groups / scale).round_().clamp_(-zero, zero - 1).mul_(scale)
        missed = rounded.sub_(groups).square_() @ share  # (groups, rows)
        columns.append((missed * costs).sum(1).double().cpu().numpy())
    return np.stack(columns, axis=1)


def best_widths(table: F64Array, sizes: npt.NDArray[np.int64]) -> list[tuple[int, ...]]:
    """The best widths of every group, never increasing, for each of a ladder of prices a bit."""
    widths = np.array(_WIDTHS)
    spent = sizes[:, None] * widths  # (groups, widths): bits a column
    saved = np.diff(table.sum(0)) / -np.diff(spent.sum(0))
    saved = saved[saved > 0]
    uniform = [(int(width),) * len(table) for width in widths]
    if not len(saved):
        return uniform
    price = np.geomspace(saved.min() / 64, saved.max() * 64, _PRICES)[:, None]  # (prices, 1)
    best = np.zeros((_PRICES, len(widths)))
    came: list[npt.NDArray[np.intp]] = []
    for error, bits in zip(table, spent, strict=True):
        # The width before is this one or a larger one: a running minimum, and where it was.
        lowest = np.minimum.accumulate(best, axis=1)
        is_new = best == lowest
        index = np.where(is_new, np.arange(len(widths)), 0)
        came.append(np.maximum.accumulate(index, axis=1))
        best = lowest + error + price * bits
    at = best.argmin(axis=1)
    paths = [at]
    for step in reversed(came[1:]):
        at = np.take_along_axis(step, at[:, None], axis=1)[:, 0]
        paths.append(at)
    rows = widths[np.stack(paths[::-1], axis=1)]
    return list(dict.fromkeys([*uniform, *(tuple(map(int, row)) for row in rows)]))


def _scheme(n_in: int, group: int, bits: Sequence[int]) -> Scheme:
    runs, left = [], n_in
    for width, same in groupby(bits):
        rows = min(group * len(list(same)), left)
        runs.append(Run(width, rows, group))
        left -= rows
    return Scheme(tuple(runs))


def _frontier(options: Sequence[Option]) -> list[Option]:
    """Without those that another beats in size and error."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.total_bits, o.error)):
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    return kept


def _thinned(options: list[Option]) -> list[Option]:
    """At most `_MOST`, the first and the last among them."""
    if len(options) <= _MOST:
        return options
    chosen = np.unique(np.linspace(0, len(options) - 1, _MOST).round().astype(int))
    return [options[i] for i in chosen]


# The choice


@dataclass(frozen=True)
class Allocation:
    """A scheme for every matrix; `bpw` is of all the matrices, as exllamav2 counts it."""

    schemes: Mapping[str, Scheme]
    total_bits: int
    n_weights: int
    error: float

    @property
    def bpw(self) -> float:
        return self.total_bits / self.n_weights


def allocate(options: Mapping[str, Sequence[Option]], n_weights: int, bpw: float) -> Allocation:
    """The least error in at most `bpw` bits a weight, and at least `TOLERANCE` less.

    `options`: what each matrix, or set of matrices, can be. Raises InputError for a target that
    they cannot meet.
    """
    totals = [[o.total_bits for o in found] for found in options.values()]
    floor, budget = check_target([(min(t), max(t)) for t in totals], n_weights, bpw)
    chosen = _solve([*options.values()], floor, budget)
    return Allocation(
        {name: scheme for option in chosen for name, scheme in option.schemes.items()},
        sum(o.total_bits for o in chosen),
        n_weights,
        sum(o.error for o in chosen),
    )


def check_target(sizes: Sequence[tuple[int, int]], n_weights: int, bpw: float) -> tuple[int, int]:
    """The fewest and the most bits that meet a target, for matrices that take from … to `sizes`.

    Raises InputError where they cannot.
    """
    least, most = sum(low for low, _ in sizes), sum(high for _, high in sizes)
    budget = int(bpw * n_weights)
    floor = budget - int(TOLERANCE * n_weights)
    if budget < least or floor > most:
        raise InputError(
            f"--bpw {bpw:g}: this model's layers take {least / n_weights:.3f} to "
            f"{most / n_weights:.3f} bits a weight; give a number between"
        )
    return floor, budget


def _solve(table: Sequence[Sequence[Option]], floor: int, budget: int) -> list[Option]:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_matrix

    rows = [(i, option) for i, options in enumerate(table) for option in options]
    error = np.array([o.error for _, o in rows])
    spent = np.array([o.total_bits for _, o in rows], np.float64)
    owners = np.array([i for i, _ in rows])
    one_each = coo_matrix((np.ones(len(rows)), (owners, np.arange(len(rows)))))
    # In units of about what a good choice loses, so that the solver's own tolerances mean little.
    lowest = np.array([min(o.error for o in options) for options in table])
    excess = error - lowest[owners]
    scale = max(float(np.median(excess[excess > 0])) if (excess > 0).any() else 1.0, 1e-300)
    result = milp(
        excess / scale,
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(spent[None] / budget, floor / budget, 1),
        ],
        integrality=np.ones(len(rows)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-4, "time_limit": 60},
    )
    if result.x is None:
        raise DsqError(f"the integer program was not solved: {result.message}")
    best = [-1] * len(table)
    for k in np.argsort(result.x):  # the largest of each owner comes last
        best[owners[k]] = int(k)
    return [rows[k][1] for k in best]
