"""A type for every tensor, found by measuring: the least divergence under a budget of bytes.

Each tensor has candidates, each candidate a size and an estimated divergence of the output (see
`runtime.sensitivity`). Divergences add up, to second order, so the choice is a multiple-choice
knapsack: an integer program, solved exactly by HiGHS (`scipy.optimize.milp`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsq.errors import DsqError, InputError
from dsq.quant.scheme import BY_NAME, GgmlType, target_type

RECIPE_VERSION = 1

# What a mix may be made of: types that llama.cpp runs fast everywhere and that the solver knows.
# A row that is no multiple of 256 has the second list only.
SUPERBLOCK = ("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k")
BLOCK = ("q4_0", "iq4_nl", "q4_1", "q5_0", "q5_1", "q8_0")


def candidates(n_per_row: int) -> list[GgmlType]:
    """The types that can hold rows of `n_per_row` values; f16 when no block divides them."""
    names = (*SUPERBLOCK, *BLOCK)
    found = [BY_NAME[name] for name in names if n_per_row % BY_NAME[name].block_size == 0]
    return found or [BY_NAME["f16"]]


@dataclass(frozen=True)
class Choice:
    """One tensor in one type: the bytes it takes, and what it adds to the output's mean KLD."""

    type: GgmlType
    n_bytes: int
    kld: float


@dataclass(frozen=True)
class Mix:
    """The chosen type of each tensor; `n_bytes` and `kld` are sums over those tensors."""

    types: Mapping[str, GgmlType]
    n_bytes: int
    kld: float


def under_budget(table: Mapping[str, Sequence[Choice]], n_bytes: int) -> Mix:
    """The least divergence in at most `n_bytes`. Raises InputError when nothing fits."""
    least = sum(min(c.n_bytes for c in choices) for choices in table.values())
    if least > n_bytes:
        raise InputError(
            f"the budget leaves {n_bytes:,} bytes for the matrices, but they take {least:,} at "
            "the least; raise the target"
        )
    return _solve(table, weigh="kld", limit="n_bytes", bound=n_bytes)


def under_divergence(table: Mapping[str, Sequence[Choice]], kld: float) -> Mix:
    """The fewest bytes with a divergence of at most `kld`. Raises InputError if none has."""
    least = sum(min(c.kld for c in choices) for choices in table.values())
    if least > kld:
        raise InputError(
            f"a mean KLD of {kld:g} is below what the largest types give ({least:.3g}); raise it, "
            "or keep the model at q8_0 or bf16"
        )
    return _solve(table, weigh="n_bytes", limit="kld", bound=kld)


def _solve(table: Mapping[str, Sequence[Choice]], weigh: str, limit: str, bound: float) -> Mix:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_matrix

    rows = [(i, c) for i, choices in enumerate(table.values()) for c in choices]
    cost = np.array([getattr(c, weigh) for _, c in rows], np.float64)
    spent = np.array([getattr(c, limit) for _, c in rows], np.float64)
    owners = np.array([i for i, _ in rows])
    one_each = coo_matrix((np.ones(len(rows)), (owners, np.arange(len(rows)))))
    scale = max(float(cost.max()), 1e-300)
    result = milp(
        cost / scale,
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(spent[None] / bound, -np.inf, 1),
        ],
        integrality=np.ones(len(rows)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-6, "time_limit": 60},
    )
    if result.x is None:
        raise DsqError(f"the integer program was not solved: {result.message}")
    chosen = [c for (_, c), x in zip(rows, result.x, strict=True) if x > 0.5]
    return Mix(
        {name: c.type for name, c in zip(table, chosen, strict=True)},
        sum(c.n_bytes for c in chosen),
        sum(c.kld for c in chosen),
    )


def curve(table: Mapping[str, Sequence[Choice]], n_points: int = 9) -> list[Mix]:
    """The predicted curve: the best mix at sizes from the smallest to the largest."""
    least = sum(min(c.n_bytes for c in choices) for choices in table.values())
    most = sum(max(c.n_bytes for c in choices) for choices in table.values())
    sizes = np.unique(np.linspace(least, most, n_points).astype(np.int64))
    return [under_budget(table, int(size)) for size in sizes]


# Recipes


@dataclass(frozen=True)
class Recipe:
    """A mix as a file: readable, editable, good for any model of the same tensors."""

    types: Mapping[str, GgmlType]
    about: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        types = {name: of.name for name, of in self.types.items()}
        return {"dsq_recipe": RECIPE_VERSION, **self.about, "types": types}

    def tensor_types(self) -> tuple[tuple[re.Pattern[str], GgmlType], ...]:
        """As `plan.Options.tensor_types` wants them."""
        return tuple((re.compile(rf"\A{re.escape(n)}\Z"), of) for n, of in self.types.items())

    def check(self, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Refuse a recipe that is not for a model of these tensors.

        `shapes` has the model's matrices by GGUF name. Raises InputError naming the tensor.
        """
        for name, of in self.types.items():
            if name not in shapes:
                raise InputError(
                    f"{where}: {name} is no matrix of this model; the recipe is for another shape"
                )
            if shapes[name][-1] % of.block_size:
                raise InputError(
                    f"{where}: {name} has rows of {shapes[name][-1]}, which {of} cannot hold "
                    f"(blocks of {of.block_size}); name another type"
                )
        missing = sorted(set(shapes) - set(self.types))
        if missing:
            raise InputError(
                f"{where}: no type for {missing[0]}; the recipe is for another shape, or a line "
                "was lost"
            )


def read_recipe(path: Path) -> Recipe:
    """Raises InputError for what is no recipe."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the recipe: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    types = content.get("types") if isinstance(content, dict) else None
    if not isinstance(types, dict) or not types:
        raise InputError(f'{path}: no recipe; "types" must map tensor names to types')
    if content.get("dsq_recipe") != RECIPE_VERSION:
        raise InputError(
            f"{path}: dsq_recipe is {content.get('dsq_recipe')!r}; this dsq reads {RECIPE_VERSION}"
        )
    found = {}
    for name, of in types.items():
        if not isinstance(of, str):
            raise InputError(f"{path}: the type of {name} is {of!r}; write its name, like q4_k")
        try:
            found[name] = target_type(of)
        except InputError as error:
            raise InputError(f"{path}: {name}: {error}") from error
    about = {k: v for k, v in content.items() if k not in ("types", "dsq_recipe")}
    return Recipe(found, about)


def main_type(sizes: Iterable[tuple[GgmlType, int]]) -> GgmlType:
    """The type that holds most bytes: what a mixed file is called by."""
    total: dict[GgmlType, int] = {}
    for of, n_bytes in sizes:
        total[of] = total.get(of, 0) + n_bytes
    return max(total, key=lambda of: (total[of], of.name))
