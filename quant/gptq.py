"""GPTQ's grids: groups with an f16 scale and a whole zero point, act-order, static groups.

A weight is `(code - zero) · scale`. The scales of a group are searched on its weights as they have
become (all columns before it rounded), the codes found by `dsq.quant.solver`. What is rounded to is
the scale as it is stored, in f16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dsq.errors import InputError
from dsq.quant.gptq_layout import GPTQ_BITS, Format, GptqTensor, check_packable
from dsq.quant.solver import DAMP, Factor, aim, factor, feedback

if TYPE_CHECKING:
    from torch import Tensor

GROUP_SIZES = (32, 64, 128, -1)
_F16_MAX, _F16_LEAST = 65504.0, 2.0**-24
_CHUNK = 1 << 16  # weights searched at once: they stay in a core's cache
_STATIC_RUN = 128  # columns that the solver takes together where groups need not


@dataclass(frozen=True)
class Scheme:
    """How one matrix is stored. `group_size` -1 is one group for all inputs."""

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    act_order: bool = False  # columns of large activations are rounded first
    static_groups: bool = False  # scales are those of the weights before any is rounded

    def __post_init__(self) -> None:
        if self.bits not in GPTQ_BITS:
            raise InputError(f"--bits {self.bits}: GPTQ has {', '.join(map(str, GPTQ_BITS))}")
        if self.group_size not in GROUP_SIZES:
            raise InputError(
                f"--group-size {self.group_size}: choose {', '.join(map(str, GROUP_SIZES))}"
            )

    def n_groups(self, n_in: int) -> int:
        return 1 if self.group_size == -1 else -(-n_in // self.group_size)

    def group(self, n_in: int) -> int:
        """Columns of a group."""
        return n_in if self.group_size == -1 else self.group_size

    def check(self, name: str, n_in: int, n_out: int, *, allow_ragged: bool) -> None:
        """Refuse a matrix that cannot be stored so. Raises InputError naming it."""
        try:
            check_packable(n_in, n_out, self.bits)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        if n_in % self.group(n_in) and not allow_ragged:
            fitting = [g for g in GROUP_SIZES if g > 0 and n_in % g == 0]
            raise InputError(
                f"{name}: groups of {self.group_size} do not divide its {n_in} inputs, which "
                f"Marlin and exllamav2 refuse; give --group-size "
                f"{' or '.join(map(str, [*fitting, -1]))}, or --allow-ragged"
            )


@dataclass(frozen=True, eq=False)
class Quantized:
    """A matrix as stored. `values` (n_out, n_in) is what `tensor` holds.

    `error` is tr((W - Q) H (W - Q)ᵀ) for each row (n_out), `nearest` the same had each weight gone
    to the nearest value of its grid.
    """

    tensor: GptqTensor
    values: Tensor
    error: Tensor
    nearest: Tensor


@dataclass(frozen=True, eq=False)
class Order:
    """A Hessian (n_in, n_in), factorized in the order in which columns are rounded."""

    under: Factor
    columns: Tensor | None  # (n_in) by turn; None: as they come


def ordered(hessian: Tensor, name: str, *, act_order: bool, damp: float = DAMP) -> Order:
    """Raises InputError naming `name` for a Hessian that is NaN, Inf or negative."""
    if not act_order:
        return Order(factor(hessian, name, damp), None)
    columns = hessian.diagonal().argsort(descending=True, stable=True)
    return Order(factor(hessian[columns][:, columns], name, damp), columns)


def quantize(
    name: str,
    weight: Tensor,
    missing: Tensor,
    order: Order,
    scheme: Scheme,
    checkpoint_format: Format = "gptq",
) -> Quantized:
    """Quantize `weight` (n_out, n_in), making up for `missing` (n_out, n_in): see `solver.aim`.

    Raises InputError naming `name` for weights that an f16 scale cannot hold.
    """
    return _Solve(name, weight, missing, order, scheme, checkpoint_format).run()


class _Solve:
    """Everything in the order of `Order.columns`, transposed: (n_in, n_out)."""

    def __init__(
        self,
        name: str,
        weight: Tensor,
        missing: Tensor,
        order: Order,
        scheme: Scheme,
        checkpoint_format: Format,
    ) -> None:
        import torch

        self.name, self.scheme, self.order = name, scheme, order
        # GPTQModel adds the one that `gptq` takes off with a carry: a zero that wraps would spoil
        # its neighbour there, so 0 is not used.
        self.least_zero = 1 if checkpoint_format == "gptq" else 0
        columns = order.columns
        if columns is not None:
            weight, missing = weight[:, columns], missing[:, columns]
        self.weight = aim(weight, missing, order.under).T.contiguous()
        n_in, n_out = self.weight.shape
        shape = scheme.n_groups(n_in), n_out
        self.scales = torch.empty(shape, device=weight.device)
        self.zeros = torch.empty(shape, device=weight.device)
        turns = torch.arange(n_in, device=weight.device)
        by_place = turns if columns is None or not scheme.static_groups else columns
        self.group_of = by_place // scheme.group(n_in)  # of each turn

    def run(self) -> Quantized:
        import torch

        scheme, order = self.scheme, self.order
        n_in = len(self.weight)
        if scheme.static_groups:
            for group in range(scheme.n_groups(n_in)):
                self.search(group, self.weight[self.group_of == group])
        run = _STATIC_RUN if scheme.static_groups else scheme.group(n_in)
        found = feedback(self.weight, order.under, self.choose, run)
        nearest = self.error_of_nearest()
        codes, values, group_of = found.codes, found.values, self.group_of
        if order.columns is not None:
            back = torch.empty_like(order.columns)
            back[order.columns] = torch.arange(n_in, device=back.device)
            codes, values, group_of = codes[back], values[back], group_of[back]
        tensor = GptqTensor(
            codes.cpu().numpy(),
            self.zeros.to(torch.uint8).cpu().numpy(),
            self.scales.half().cpu().numpy(),
            group_of.cpu().numpy().astype(np.int32),
            scheme.bits,
        )
        return Quantized(tensor, values.T, found.error, nearest)

    def choose(self, begin: int, wanted: Tensor) -> _Columns:
        """For the solver: the grid of the columns from `begin` on."""
        if not self.scheme.static_groups:
            self.search(begin // self.scheme.group(len(self.weight)), wanted)
        groups = self.group_of[begin : begin + len(wanted)].tolist()
        return _Columns(self.scales, self.zeros, groups, (1 << self.scheme.bits) - 1)

    def search(self, group: int, wanted: Tensor) -> None:
        """Choose scale and zero of a group for its weights (columns, n_out)."""
        largest = float(wanted.abs().max())
        if not largest <= _F16_MAX:  # NaN too
            raise InputError(
                f"{self.name}: its compensated weights go up to {largest:g}, which an f16 scale "
                f"cannot hold; calibrate on other text, or give more --damp"
            )
        step = max(1, _CHUNK // len(wanted))
        for start in range(0, wanted.shape[1], step):
            part = slice(start, start + step)
            scale, zero = search(
                wanted[:, part], self.scheme.bits, sym=self.scheme.sym, least_zero=self.least_zero
            )
            self.scales[group, part], self.zeros[group, part] = scale, zero

    def error_of_nearest(self) -> Tensor:
        scale, zero = self.scales[self.group_of], self.zeros[self.group_of]
        most = (1 << self.scheme.bits) - 1
        codes = self.weight.div(scale).add_(zero).round_().clamp_(0, most)
        missed = self.weight - codes.sub_(zero).mul_(scale)
        return (missed.T @ self.order.under.upper).square().sum(1)


class _Columns:
    """Columns whose scales are chosen: see `solver.Columns`."""

    def __init__(self, scales: Tensor, zeros: Tensor, groups: list[int], most: int) -> None:
        self.scales, self.zeros, self.groups, self.most = scales, zeros, groups, most

    def round(self, i: int, values: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        scale, zero = self.scales[self.groups[i]], self.zeros[self.groups[i]]
        codes = values.div(scale).add_(zero).round_().clamp_(0, self.most)
        return codes.to(torch.uint8), (codes - zero).mul_(scale)


# Ends of the grid, as shares of the largest weight: what lies outside is clipped.
_SHARES = {
    2: (1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.52, 0.44),
    3: (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.62, 0.54),
    4: (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.74, 0.68),
    8: (1.0,),
}


def search(wanted: Tensor, bits: int, *, sym: bool, least_zero: int = 0) -> tuple[Tensor, Tensor]:
    """Scale (a value of f16, never 0) and zero (n_out) for weights (columns, n_out).

    Of several clippings the one of least squared error, its scale the least squares fit to the
    codes. With `sym` the zero is the middle code, and the scale negative where that lets the
    largest weight have the one code more that lies below it.
    """
    import torch

    top = (1 << bits) - 1
    middle = float(1 << (bits - 1))
    high, low = wanted.amax(0).clamp_(min=0), wanted.amin(0).clamp_(max=0)
    candidates: list[tuple[Tensor, Tensor]] = []
    if sym:
        zero = torch.full_like(high, middle)
        signed = torch.where(-low >= high, low, high)  # the largest, with its sign
        for share in _SHARES[bits]:
            candidates.append((signed * (share / -middle), zero))
            candidates.append((signed * (share / (middle - 1)), zero))
    else:
        for share in _SHARES[bits]:
            scale = (high - low) * (share / top)
            zero = (-low * share / scale.clamp(min=_F16_LEAST)).round_().clamp_(least_zero, top)
            candidates.append((scale, zero))
    best = torch.full_like(high, -torch.inf)
    best_scale, best_zero = candidates[0]
    for scale, zero in candidates:
        scale = torch.where(scale.abs() < _F16_LEAST, _F16_LEAST, scale)
        steps = wanted.div(scale).add_(zero).round_().clamp_(0, top).sub_(zero)
        along, size = (wanted * steps).sum(0), steps.square_().sum(0)
        fitted = along / size.clamp(min=1e-30)
        gain = along * fitted  # Σ w² - Σ (w - scale · step)²
        better = gain > best
        best = torch.where(better, gain, best)
        best_scale = torch.where(better, torch.where(size > 0, fitted, scale), best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return as_f16(best_scale), best_zero


def as_f16(scale: Tensor) -> Tensor:
    """The nearest values that f16 holds, in float32 and never 0, which readers refuse."""
    import torch

    scale = scale.clamp(-_F16_MAX, _F16_MAX).half().float()
    return torch.where(scale.abs() < _F16_LEAST, _F16_LEAST, scale)
