"""Reads GPTQ checkpoints, AutoGPTQ's and GPTQModel's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsq.convert.gptq.config import GptqConfig
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
from dsq.quant.gptq_blocks import gathering, run_groups
from dsq.quant.gptq_layout import (
    PARTS,
    GptqTensor,
    check_g_idx,
    check_packable,
    part_shapes,
    unpack,
    unpack_zeros,
)
from dsq.quant.scheme import BF16, BY_NAME, F16, F32

_I32 = BY_NAME["i32"]
_DOWN = ".mlp.down_proj.weight"
Order = npt.NDArray[np.intp]
_TYPES = {"qweight": (_I32,), "qzeros": (_I32,), "scales": (F16, BF16, F32), "g_idx": (_I32,)}


class GptqLinears(PackedLinears):
    """`config` is what the directory says; the tensors' shapes are checked against it."""

    method = "gptq"

    def __init__(
        self, path: Path, config: GptqConfig, modules: Mapping[str, Parts], read: Read
    ) -> None:
        self.config = config
        self._in_order: dict[str, Order] = {}
        self._out_order: dict[str, Order] = {}
        shapes = {module: _check(config, module, parts) for module, parts in modules.items()}
        super().__init__(path, modules, shapes, read)

    def bits(self, name: str) -> int:
        settings = self.config.of_module(name.removesuffix(".weight"))
        assert settings is not None  # `_check` refused it
        return settings[0]

    def codes(self, name: str) -> GptqTensor:
        parts = self.read_parts(name, PARTS)
        try:
            check_scales("scales", parts["scales"])
            tensor = unpack(
                parts,
                self.bits(name),
                self.config.checkpoint_format,
                borrow=self.config.zeros_borrow,
            )
        except InputError as error:
            raise self.damaged(name, error) from None
        finally:
            self.release(name)
        if (order := self._in_order.get(name)) is not None:
            tensor = replace(tensor, codes=tensor.codes[order], g_idx=tensor.g_idx[order])
        if (order := self._out_order.get(name)) is not None:
            tensor = tensor.columns(order)
        return tensor

    def layout(self, name: str) -> Layout:
        assert not self._in_order, "gathered: the words are in the files' order still"
        g_idx, scales, bits = self.g_idx(name), self.read_part(name, "scales"), self.bits(name)
        try:
            check_scales("scales", scales)
            check_g_idx(g_idx, len(scales))
        except InputError as error:
            raise self.damaged(name, error) from None
        n_in = len(g_idx)
        run = PackedRun(slice(0, n_in), bits, slice(0, n_in * bits // 32))
        return Layout([run], g_idx, None)

    def contents(
        self, name: str
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any], npt.NDArray[Any]]:
        return self.read_part(name, "qweight"), self.zeros(name), self.read_part(name, "scales")

    def g_idx(self, name: str) -> npt.NDArray[np.int32]:
        """The group of each input."""
        order = self._in_order.get(name)
        g_idx = self.read_part(name, "g_idx")
        return g_idx if order is None else g_idx[order]

    def zeros(self, name: str) -> npt.NDArray[np.uint8]:
        """The zero points, (n_groups, n_out), for a look at them without the codes."""
        order = self._out_order.get(name)
        zeros = unpack_zeros(
            self.read_part(name, "qzeros"),
            self.bits(name),
            self.tensors[name].shape[0],
            self.config.checkpoint_format,
            borrow=self.config.zeros_borrow,
        )
        return zeros if order is None else zeros[:, order]

    def gathered_names(self) -> list[str]:
        """The matrices whose inputs `gathered` sorted."""
        return list(self._in_order)

    def gathered(self) -> GptqLinears:
        """Itself, or the same model with the feed-forward's inner channels in another order.

        Where act-order scatters the groups of `down_proj`, its inputs are sorted by group, and the
        rows of `gate_proj` and `up_proj` with them: their products are the same numbers. Layers
        that are in order, or keep one of the three dense, stay as they are. For models without
        biases in the feed-forward.
        """
        other = GptqLinears(self._path, self.config, self._modules, self._read)
        for name in self.tensors:
            if not name.endswith(_DOWN):
                continue
            layer = name.removesuffix(_DOWN)
            feeding = [f"{layer}.mlp.{kind}_proj.weight" for kind in ("gate", "up")]
            if not all(feed in self.tensors for feed in feeding):
                continue
            g_idx = self.g_idx(name)
            order = gathering(g_idx) if run_groups(g_idx) is None else None
            if order is not None:
                other._in_order[name] = order
                other._out_order |= dict.fromkeys(feeding, order)
        return other if other._in_order else self

    def kind(self, name: str) -> str:
        return f"gptq {self.bits(name)}-bit"


def _check(config: GptqConfig, module: str, parts: Parts) -> tuple[int, int]:
    """The matrix's (n_out, n_in), after checking what the headers tell."""
    for part, types in _TYPES.items():
        check_part(parts[part], types, 1 if part == "g_idx" else 2)
    n_in, (n_groups, n_out) = parts["g_idx"].shape[0], parts["scales"].shape
    settings = config.of_module(module)
    if settings is None:
        raise InputError(
            f"{parts['scales'].path}: {module} is packed, but {config.file} leaves it dense "
            f"(dynamic); one of them belongs to another model"
        )
    bits, group_size = settings
    rows = parts["qweight"].shape[0]
    if rows * 32 != n_in * bits:
        fits = f", which is {rows * 32 / n_in:g} bits" if n_in else ""
        raise InputError(
            f"{parts['qweight'].path}: {module}.qweight has {rows} rows for {n_in} inputs{fits}; "
            f"{config.file} says {bits}"
        )
    wanted = 1 if group_size == -1 else -(-n_in // max(group_size, 1))
    if n_groups != wanted:
        raise InputError(
            f"{parts['scales'].path}: {module}.scales has {n_groups} groups; {n_in} inputs in "
            f"groups of {group_size} make {wanted}"
        )
    try:
        check_packable(n_in, n_out, bits)
    except InputError as error:
        raise InputError(f"{parts['qweight'].path}: {module}: {error}") from None
    for part, shape in part_shapes(n_in, n_out, n_groups, bits).items():
        if parts[part].shape != shape:
            raise InputError(
                f"{parts[part].path}: {module}.{part} has shape {list(parts[part].shape)}; "
                f"expected {list(shape)}"
            )
    return n_out, n_in
