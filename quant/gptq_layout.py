"""One GPTQ linear: its codes, and the four tensors that they are packed into.

AutoGPTQ's layout, which GPTQModel, transformers, vLLM and exllamav2 read: everything transposed
(input rows × output columns), codes packed along the input, zero points along the output.
Format `gptq` stores zero − 1, wrapping at 0; `gptq_v2` stores the zero itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dsq.errors import InputError
from dsq.quant.bitstream import (
    codes_per_run,
    dequantize_transposed,
    pack_words,
    unpack_words,
)

GPTQ_BITS = (2, 3, 4, 8)
PARTS = ("qweight", "qzeros", "scales", "g_idx")
Format = Literal["gptq", "gptq_v2"]


@dataclass(frozen=True, eq=False)
class GptqTensor:
    """Weight (o, i) is (codes[i, o] − zeros[g, o]) · scales[g, o] with g = g_idx[i].

    codes: u8 (n_in, n_out); zeros: u8 (n_groups, n_out); scales: f16 (n_groups, n_out);
    g_idx: i32 (n_in,), the group of each input row, in any order.
    """

    codes: npt.NDArray[np.uint8]
    zeros: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.floating[Any]]
    g_idx: npt.NDArray[np.int32]
    bits: int

    def columns(self, which: slice | npt.NDArray[np.intp]) -> GptqTensor:
        """Some of the outputs, or all in another order."""
        return replace(
            self,
            codes=self.codes[:, which],
            zeros=self.zeros[:, which],
            scales=self.scales[:, which],
        )

    def dequantized(self) -> npt.NDArray[np.float32]:
        """The weights, exact: f32 (n_out, n_in), Hugging Face's orientation."""
        return dequantize_transposed(
            self.codes,
            np.arange(len(self.codes)),
            self.g_idx,
            self.zeros.astype(np.float32),
            self.scales.astype(np.float32),
        )


def check_packable(n_in: int, n_out: int, bits: int) -> None:
    """Raise InputError for a shape whose codes or zero points do not fill whole words."""
    if bits not in GPTQ_BITS:
        raise InputError(f"GPTQ has {', '.join(map(str, GPTQ_BITS))} bits, not {bits}")
    run = codes_per_run(bits)
    for what, n in (("inputs", n_in), ("outputs", n_out)):
        if n == 0 or n % run:
            raise InputError(
                f"{n} {what} cannot be packed at {bits} bits: GPTQ wants multiples of {run}"
            )


def pack(tensor: GptqTensor, checkpoint_format: Format = "gptq") -> dict[str, npt.NDArray[Any]]:
    """`qweight` i32 (n_in · bits / 32, n_out), `qzeros` i32 (n_groups, n_out · bits / 32),
    `scales` f16 (n_groups, n_out) and `g_idx` i32 (n_in,).

    Raises InputError for codes of too many bits and shapes that do not fill whole words.
    """
    n_in, n_out = tensor.codes.shape
    check_packable(n_in, n_out, tensor.bits)
    zeros = tensor.zeros
    if zeros.size and zeros.max() >> tensor.bits:
        raise InputError(f"a zero point of {zeros.max()} does not fit into {tensor.bits} bits")
    if checkpoint_format == "gptq":
        zeros = (zeros - np.uint8(1)) & _mask(tensor.bits)
    return {
        "qweight": pack_words(tensor.codes, tensor.bits),
        "qzeros": np.ascontiguousarray(pack_words(zeros.T, tensor.bits).T),
        "scales": np.ascontiguousarray(tensor.scales, dtype=np.float16),
        "g_idx": np.ascontiguousarray(tensor.g_idx, dtype=np.int32),
    }


def unpack(
    parts: Mapping[str, npt.NDArray[Any]],
    bits: int,
    checkpoint_format: Format = "gptq",
    *,
    borrow: bool = False,
) -> GptqTensor:
    """The linear that `parts` (the names of `PARTS`, shaped as by `pack`) hold.

    `borrow` is for GPTQModel's files of format `gptq`: except at 3 bits it subtracts the ones from
    a whole word, so that a zero of 0 borrows from its neighbour, and adds them the same way.
    Raises InputError where the shapes disagree or g_idx points past the groups.
    """
    qweight, qzeros, scales, g_idx = (parts[name] for name in PARTS)
    n_in, (n_groups, n_out) = g_idx.size, scales.shape
    check_packable(n_in, n_out, bits)
    shapes = part_shapes(n_in, n_out, n_groups, bits)
    for name, shape in shapes.items():
        if parts[name].shape != shape:
            raise InputError(f"{name} is {list(parts[name].shape)}, not {list(shape)}")
    check_g_idx(g_idx, n_groups)
    zeros = unpack_zeros(qzeros, bits, n_out, checkpoint_format, borrow=borrow)
    codes = unpack_words(qweight, bits, n_in)
    return GptqTensor(codes, zeros, scales, g_idx, bits)


def check_g_idx(g_idx: npt.NDArray[np.int32], n_groups: int) -> None:
    """Raise InputError for inputs of groups that are not there."""
    if g_idx.min() < 0 or g_idx.max() >= n_groups:
        raise InputError(
            f"g_idx goes from {g_idx.min()} to {g_idx.max()}, but there are {n_groups} groups"
        )


def unpack_zeros(
    qzeros: npt.NDArray[np.int32],
    bits: int,
    n_out: int,
    checkpoint_format: Format = "gptq",
    *,
    borrow: bool = False,
) -> npt.NDArray[np.uint8]:
    """The zero points of `qzeros`, u8 (n_groups, n_out); `borrow` as in `unpack`."""
    borrow = borrow and checkpoint_format == "gptq" and bits != 3
    if borrow:
        ones = np.uint32(sum(1 << i for i in range(0, 32, bits)))
        qzeros = (qzeros.view(np.uint32) + ones).view(np.int32)
    zeros = unpack_words(np.ascontiguousarray(qzeros.T), bits, n_out).T
    if checkpoint_format == "gptq" and not borrow:
        zeros = (zeros + np.uint8(1)) & _mask(bits)
    return np.ascontiguousarray(zeros)


def part_shapes(n_in: int, n_out: int, n_groups: int, bits: int) -> dict[str, tuple[int, ...]]:
    """The shape of each of `PARTS`."""
    return {
        "qweight": (n_in * bits // 32, n_out),
        "qzeros": (n_groups, n_out * bits // 32),
        "scales": (n_groups, n_out),
        "g_idx": (n_in,),
    }


def _mask(bits: int) -> np.uint8:
    return np.uint8((1 << bits) - 1)
