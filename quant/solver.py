"""Error feedback on any grid: round one column, let the columns after it make up for the error.

GPTQ (Frantar et al., arXiv 2210.17323), written with a factor of the Hessian itself rather than
of its inverse: with H = R Rᵀ, R upper triangular, the column to be rounded is

    w'_j = w_j + Σ_{k<j} (w_k - q_k) R_kj / R_jj

which is GPTQ's update without an inverse, and the layer's error tr((W - Q) H (W - Q)ᵀ) is
Σ_j R_jj² |w'_j - q_j|². So R_jj² is what an error in column j costs once the later columns have
done what they can. What a column needs of those before it is one product of (W - Q) and R, so
nearly all the work is matrix products: columns are halved until few are left.

Nothing here knows ggml: see `dsq.quant.compensated` for its types. A caller that wants another
order of columns (act-order) permutes the weight and the Hessian.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dsq.errors import InputError
from dsq.quant.threads import torch_threads

if TYPE_CHECKING:
    from torch import Tensor

DAMP = 0.1  # of the mean diagonal
_LEAST_DAMP = 1e-4
_LEAF = 16  # columns rounded one by one before their error is spread by a matrix product
_LARGE = 1 << 26  # multiplications of a product that is worth several threads


class Columns(Protocol):
    """The grid of some columns, chosen and fixed."""

    def round(self, i: int, values: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest codes (uint8) and values to `values` (n_out) on the grid of column `i`."""
        ...


ChooseGrid = Callable[[int, "Tensor"], Columns]
"""Called with the first column of a group and the group's present weights (columns, n_out)."""


@dataclass(frozen=True, eq=False)
class Factor:
    """R of H + damp · mean(diag H) · I = R Rᵀ: upper triangular, (n_in, n_in)."""

    upper: Tensor
    damp: float
    dead: int  # channels that are never active

    @property
    def cost(self) -> Tensor:
        """(n_in): what an error in each column costs, the later columns doing what they can."""
        return self.upper.diagonal().square()


@dataclass(frozen=True, eq=False)
class Solution:
    """Codes (uint8) and values, both (n_in, n_out); `error` (n_out) of each row under H."""

    codes: Tensor
    values: Tensor
    error: Tensor


def factor(hessian: Tensor, name: str, damp: float = DAMP) -> Factor:
    """Factorize a Hessian (n_in, n_in), with ever more damp while it is not definite.

    A dead channel (nothing on its diagonal) gets the mean of all, so that its weights are rounded
    to the nearest. Raises InputError naming `name` for NaN, Inf or a negative diagonal.
    """
    import torch

    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(hessian).all()) or bool((diagonal < 0).any()):
        raise InputError(
            f"{name}: its Hessian has values that are NaN, Inf or below zero: the calibration or "
            f"the model is damaged; calibrate again, and try dsq verify on the model"
        )
    dead = diagonal == 0
    mean = float(diagonal.mean()) or 1.0
    used = damp
    while True:
        flipped = hessian.flip(0, 1)  # its lower factor, flipped back, is the upper one
        flipped.diagonal().add_(torch.where(dead, mean, used * mean).flip(0))
        lower, failed = torch.linalg.cholesky_ex(flipped)
        if not int(failed) and bool(torch.isfinite(lower).all()):
            return Factor(lower.flip(0, 1), used, int(dead.sum()))
        used = max(10 * used, _LEAST_DAMP)


def aim(weight: Tensor, missing: Tensor, under: Factor) -> Tensor:
    """What `weight` (n_out, n_in) should be, so that its output makes up for what is missing.

    `missing` (n_out, n_in) is E[m xᵀ], x the layer's input and m what its output lacks with the
    weight as it is: the least squares answer under the factorized Hessian is W + missing · H⁻¹.
    GPTQ rounds W itself; GPTAQ (Li et al., arXiv 2504.02692) aims at the original's output.
    """
    import torch

    upper = under.upper
    half = torch.linalg.solve_triangular(upper, missing.T, upper=True)
    moved: Tensor = torch.linalg.solve_triangular(upper.T, half, upper=False).T
    return weight + moved


def feedback(weight: Tensor, under: Factor, choose: ChooseGrid, group: int) -> Solution:
    """Round `weight` (n_in, n_out; a column of the layer is a row here) on the grids of `choose`.

    `group` columns share a grid, which is chosen on their weights as they are when all columns
    before them are rounded.
    """
    return _Feedback(weight, under, choose, group).solve()


class _Feedback:
    def __init__(self, weight: Tensor, under: Factor, choose: ChooseGrid, group: int) -> None:
        import torch

        self.weight, self.choose, self.group = weight, choose, group
        self.threads = torch.get_num_threads()
        diagonal = under.upper.diagonal()
        self.share = under.upper / diagonal  # R_kj / R_jj
        self.costs = under.cost.tolist()
        self.wanted = weight.clone()  # w', complete in a column when its turn comes
        self.values = torch.empty_like(weight)
        self.missed = torch.empty_like(weight)  # w - q
        self.codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        self.error = torch.zeros_like(weight[0])

    def solve(self) -> Solution:
        n_in = len(self.weight)
        with torch_threads(1):  # waking other threads takes longer than a column does
            self.groups(0, -(-n_in // self.group))
        return Solution(self.codes, self.values, self.error)

    def groups(self, first: int, last: int) -> None:
        """Round the groups first … last - 1."""
        begin, end = first * self.group, min(last * self.group, len(self.weight))
        if last - first == 1:
            self.columns(self.choose(begin, self.wanted[begin:end]), begin, begin, end)
            return
        middle = (first + last) // 2
        self.groups(first, middle)
        self.spread(begin, middle * self.group, end)
        self.groups(middle, last)

    def columns(self, grid: Columns, origin: int, begin: int, end: int) -> None:
        """Round the columns begin … end - 1 of the group that starts at `origin`."""
        if end - begin > _LEAF:
            middle = (begin + end) // 2
            self.columns(grid, origin, begin, middle)
            self.spread(begin, middle, end)
            self.columns(grid, origin, middle, end)
            return
        for j in range(begin, end):
            wanted = self.wanted[j]
            if j > begin:
                wanted.addmv_(self.missed[begin:j].T, self.share[begin:j, j])
            self.codes[j], self.values[j] = grid.round(j - origin, wanted)
            self.missed[j] = self.weight[j] - self.values[j]
            self.error.add_((wanted - self.values[j]).square_(), alpha=self.costs[j])

    def spread(self, begin: int, middle: int, end: int) -> None:
        """Hand the errors of columns begin … middle - 1 on to middle … end - 1."""
        share = self.share[begin:middle, middle:end]
        wanted = self.wanted[middle:end]
        with torch_threads(self.threads if share.numel() * wanted.shape[1] >= _LARGE else 1):
            wanted.addmm_(share.T, self.missed[begin:middle])
