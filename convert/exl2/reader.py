"""Reads EXL2 checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsq.convert.packed import (
    Layout,
    PackedLinears,
    PackedRun,
    Parts,
    check_part,
    check_scales,
)
from dsq.convert.weight_files import Read
from dsq.errors import InputError
from dsq.quant.exl2_layout import (
    COLUMNS,
    PARTS,
    Exl2Tensor,
    check_permutation,
    read_groups,
    scale_values,
    unpack,
    unpack_scale_codes,
)
from dsq.quant.scheme import BY_NAME, F16

OPTIONAL = ("q_perm", "q_group_map")  # exllamav2 makes both of the others
_I16, _I32 = BY_NAME["i16"], BY_NAME["i32"]
_TYPES = {
    "q_weight": (_I32, 2),
    "q_scale": (_I32, 2),
    "q_scale_max": (F16, 1),
    "q_groups": (_I16, 1),
    "q_invperm": (_I32, 1),
}


class Exl2Linears(PackedLinears):
    """`expected` has the shape of each dense tensor: the files do not tell padding from outputs."""

    method = "exl2"

    def __init__(
        self,
        path: Path,
        modules: Mapping[str, Parts],
        expected: Mapping[str, tuple[int, ...]],
        read: Read,
    ) -> None:
        shapes = {
            module: _check(parts, expected.get(f"{module}.weight"))
            for module, parts in modules.items()
        }
        super().__init__(path, modules, shapes, read)

    def codes(self, name: str) -> Exl2Tensor:
        parts = self.read_parts(name, PARTS)
        try:
            # exllamav2 writes 0 for groups whose weights are all 0.
            check_scales("q_scale_max", parts["q_scale_max"], may_be_zero=True)
            return unpack(parts, self.tensors[name].shape[0])
        except InputError as error:
            raise self.damaged(name, error) from None
        finally:
            self.release(name)

    def layout(self, name: str) -> Layout:
        q_groups, invperm = self.read_part(name, "q_groups"), self.read_part(name, "q_invperm")
        n_packed = self.read_part(name, "q_weight").shape[0]
        try:
            check_scales("q_scale_max", self.read_part(name, "q_scale_max"), may_be_zero=True)
            bits, rows, starts = read_groups(q_groups, len(invperm), n_packed)
            check_permutation(invperm, len(invperm))
        except InputError as error:
            raise self.damaged(name, error) from None
        firsts = np.append(0, np.cumsum(rows))
        runs = []
        for width, same in groupby(range(len(bits)), key=lambda g: int(bits[g])):
            first, *_, last = [*same] * 2
            taken = slice(int(firsts[first]), int(firsts[last + 1]))
            runs.append(PackedRun(taken, width, slice(int(starts[first]), int(starts[last + 1]))))
        return Layout(runs, np.repeat(np.arange(len(bits)), rows), np.argsort(invperm))

    def contents(
        self, name: str
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any], npt.NDArray[Any]]:
        n_out = self.tensors[name].shape[0]
        codes = unpack_scale_codes(self.read_part(name, "q_scale"), n_out)
        scales = scale_values(codes, self.read_part(name, "q_scale_max")[:, None])
        bits = self.read_part(name, "q_groups").view(np.uint16)[::2]
        zeros = np.exp2(bits - 1.0).astype(np.float32)[:, None]
        return self.read_part(name, "q_weight"), np.broadcast_to(zeros, scales.shape), scales

    def kind(self, name: str) -> str:
        return "exl2"


def _check(parts: Parts, expected: tuple[int, ...] | None) -> tuple[int, int]:
    """The matrix's (n_out, n_in), after checking what the headers tell."""
    for part, (type, n_dims) in _TYPES.items():
        check_part(parts[part], (type,), n_dims)
    n_in, columns = parts["q_invperm"].shape[0], parts["q_weight"].shape[1]
    n_groups = parts["q_scale_max"].shape[0]
    for part, shape in (("q_scale", (n_groups, columns // 8)), ("q_groups", (2 * n_groups,))):
        if parts[part].shape != shape:
            raise InputError(
                f"{parts[part].path}: {parts[part].name} has shape {list(parts[part].shape)}; "
                f"expected {list(shape)}"
            )
    n_out = expected[0] if expected else columns
    # What does not fit is left as it is, for the check against the config to complain about
    return (n_out if -(-n_out // COLUMNS) * COLUMNS == columns else columns), n_in
