"""Why a tensor is not its source: the mistakes that converters make, recognised by their rows.

Each guess is tried on a few rows only; a guess that is right leaves no more than rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dsq.convert.tensor_plan import half_split_rows, interleaved_rows

if TYPE_CHECKING:
    from dsq.convert.verify_tensors import Floats, RowErrors, Rows, StoredTensor

SAMPLE = 32
SLAB_ROWS = 4096
NAMED = 4  # rows, or pairs of rows, that a message lists


def reason(
    name: str,
    artifact: Mapping[str, StoredTensor],
    source: Mapping[str, StoredTensor],
    errors: RowErrors,
    bad: Rows,
    bound: float,
) -> str:
    """One line for the tensor `name` (Hugging Face's), whose rows `bad` are wrong."""
    ours, theirs = artifact[name], source[name]
    most = len(bad) > len(errors.error) // 2
    if not np.isfinite(errors.error).all():
        n = int(np.count_nonzero(~np.isfinite(errors.error)))
        return f"{n} of its rows hold NaN or Inf, or values that overflow"
    guess = _Guess(ours, theirs, bound, _sample(bad if len(bad) else np.arange(ours.n_rows)))
    # A permutation leaves some rows where they are; anything else of this kind moves them all.
    found = guess.permutation() if 8 * len(bad) > len(errors.error) else None
    if most:
        found = found or guess.other_tensor(name, source) or guess.transposed()
    if found:
        return found
    if len(bad):
        found = guess.moved_rows(bad) or (guess.scaled() if most else None)
        if found:
            return found
    if len(bad) and not most:
        return f"{_rows(bad)} differ{'s' if len(bad) == 1 else ''} from the source"
    return (
        f"relative error {errors.relative:.3g} where {ours.info.type} explains {bound:.3g}: "
        f"these are not the source's weights"
    )


class _Guess:
    """A sample of the artifact's wrong rows, to be held against candidates."""

    def __init__(
        self, ours: StoredTensor, theirs: StoredTensor, bound: float, sample: Rows
    ) -> None:
        from dsq.convert.verify_tensors import ROW_MARGIN, WORST_ROW

        self.ours, self.theirs, self.sample = ours, theirs, sample
        self.limit = max(min(ROW_MARGIN * bound, WORST_ROW), 1e-6)
        self.values = ours.rows(sample)

    def matches(self, wanted: Floats) -> bool:
        """Whether the sample is `wanted` but for rounding, in almost all of its rows."""
        return bool(np.mean(_errors(self.values, wanted) <= self.limit) > 0.8)

    def permutation(self) -> str | None:
        """Q or K of a GGUF with its rows in another order than the rotation needs."""
        heads, n = self.ours.heads, self.ours.n_rows
        if heads is None:
            return None
        at = self.ours.order[self.sample]  # the file's rows
        straight, there = np.arange(n), interleaved_rows(n, heads)
        if self.matches(self.theirs.rows(straight[at])):
            return "its rows are in Hugging Face's order: the rotary permutation is missing"
        if self.matches(self.theirs.rows(there[there][at])):
            return "its rows are permuted twice for the rotation"
        if self.matches(self.theirs.rows(half_split_rows(n, heads)[at])):
            return "its rows are permuted for the rotation the wrong way round"
        for wrong in (w for w in range(1, n // 2 + 1) if w != heads and n % (2 * w) == 0):
            if self.matches(self.theirs.rows(interleaved_rows(n, wrong)[at])):
                return f"its rows are permuted for {wrong} heads; the source has {heads}"
        return None

    def other_tensor(self, name: str, source: Mapping[str, StoredTensor]) -> str | None:
        """It holds another tensor of the same shape: gate for up, K for V, another layer's."""
        orders = [self.sample]
        if self.ours.heads:  # V or another square matrix in Q's place, which is not permuted
            orders.append(self.ours.order[self.sample])
        for other, tensor in source.items():
            if other == name or tensor.info.shape != self.theirs.info.shape:
                continue
            if any(self.matches(tensor.rows(rows)) for rows in orders):
                return f"it holds the source's {other}"
        return None

    def transposed(self) -> str | None:
        rows, columns = self.theirs.n_rows, self.theirs.n_per_row
        if rows != columns or rows == 1:
            return None
        wanted = np.concatenate([part[:, self.sample] for _, part in _slabs(self.theirs)]).T
        return "it is transposed" if self.matches(wanted) else None

    def scaled(self) -> str | None:
        wanted = self.theirs.rows(self.sample)
        norm = float(np.vdot(wanted, wanted))
        factor = float(np.vdot(self.values, wanted)) / norm if norm else 0.0
        if factor and self.matches(wanted * np.float32(factor)):
            return f"it is the source's times {factor:.4g}"
        return None

    def moved_rows(self, bad: Rows) -> str | None:
        """Rows that are found elsewhere in the source's tensor: swapped tokens, swapped heads."""
        if self.theirs.n_per_row == 1:
            return None  # a value is found anywhere
        found = _nearest(self.values, self.theirs)
        right = _errors(self.values, self.theirs.rows(found)) <= self.limit
        pairs = {
            int(row): int(at)
            for row, at, ok in zip(self.sample, found, right, strict=True)
            if ok and row != at
        }
        if len(pairs) < 0.8 * len(self.sample):
            return None
        return self._heads(pairs) or _swaps(pairs, len(bad))

    def _heads(self, pairs: Mapping[int, int]) -> str | None:
        """Whole heads moved (Q, K, V: a head is head_dim rows)."""
        dim = self.theirs.checkpoint.spec.head_dim
        if ".self_attn." not in self.name or self.theirs.n_rows % dim:
            return None
        if len(pairs) < 3 or any(row % dim != at % dim for row, at in pairs.items()):
            return None
        moved = {row // dim: at // dim for row, at in pairs.items()}
        return _describe(moved, "head", len(moved))

    @property
    def name(self) -> str:
        from dsq.convert.names import hf_name

        own = self.ours.info.name
        return own if self.ours.checkpoint.format == "hf" else hf_name(own)


def _errors(values: Floats, wanted: Floats) -> npt.NDArray[np.float64]:
    """Relative error of each row; an empty row is right only if both are."""
    error = np.square(values - wanted, dtype=np.float64).sum(axis=1)
    norm = np.square(wanted, dtype=np.float64).sum(axis=1)
    relative: npt.NDArray[np.float64] = np.divide(
        error, norm, out=np.where(error > 0, np.inf, 0.0), where=norm > 0
    )
    return np.sqrt(relative, out=relative)


def _nearest(values: Floats, tensor: StoredTensor) -> Rows:
    """The row of `tensor` most parallel to each of `values`."""
    best = np.full(len(values), -np.inf)
    found = np.zeros(len(values), np.intp)
    for start, part in _slabs(tensor):
        length = np.sqrt(np.square(part).sum(axis=1))
        cosines = values @ part.T / np.where(length > 0, length, 1)  # (sample, slab)
        at = cosines.argmax(axis=1)
        highest = cosines[np.arange(len(values)), at]
        better = highest > best
        best[better], found[better] = highest[better], at[better] + start
    return found


def _slabs(tensor: StoredTensor) -> Iterator[tuple[int, Floats]]:
    for start in range(0, tensor.n_rows, SLAB_ROWS):
        yield start, tensor.span(start, min(start + SLAB_ROWS, tensor.n_rows))


def _sample(rows: Rows) -> Rows:
    """Up to SAMPLE of `rows`, evenly spread, always the same ones."""
    if len(rows) <= SAMPLE:
        return rows
    return rows[np.linspace(0, len(rows) - 1, SAMPLE).astype(np.intp)]


def _swaps(pairs: Mapping[int, int], n_bad: int) -> str:
    return _describe(pairs, "row", n_bad)


def _describe(moved: Mapping[int, int], what: str, n: int) -> str:
    """`rows 5 and 9 are swapped`; `row 5 holds the source's row 7 (12 rows are elsewhere)`."""
    swapped = [(a, b) for a, b in moved.items() if a < b and moved.get(b) == a]
    if swapped and 2 * len(swapped) == len(moved):
        named = ", ".join(f"{a} and {b}" for a, b in swapped[:NAMED])
        return f"{what}s {named} are swapped" + (f" ({n} {what}s differ)" if n > 2 * NAMED else "")
    named = ", ".join(f"{a} holds the source's {b}" for a, b in list(moved.items())[:NAMED])
    return f"{what} {named}" + (f" ({n} {what}s are elsewhere)" if n > NAMED else "")


def _rows(rows: Rows) -> str:
    if len(rows) == 1:
        return f"row {rows[0]}"
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return "rows " + ", ".join(str(row) for row in rows[:NAMED]) + more
