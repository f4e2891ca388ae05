"""What `--to exl2` decides before anything is measured: shapes, the head's scheme, the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
from dsq.convert.hf.quantized_dir import dense_tensor, dense_type
from dsq.convert.hf.shards import OutTensor
from dsq.convert.identity import model_identity
from dsq.convert.names import expected_tensors
from dsq.errors import InputError
from dsq.quant.exl2 import ROWS, Scheme, padded, scheme_of_shares
from dsq.quant.exl2_layout import EXL2_BITS
from dsq.quant.exl2_measurement import Measurement, read_measurement
from dsq.quant.exl2_search import allocate, check_target, extremes
from dsq.quant.scheme import F16
from dsq.quant.solver import DAMP
from dsq.runtime.decoder import STAGES

Checkpoint = HfCheckpoint | GgufCheckpoint

HEAD = "lm_head"
HEAD_BITS = (*EXL2_BITS, 16)
LINEARS = tuple(name for names in STAGES.values() for name in names)
_RICHER = 0.15  # of the head's rows have the next width, as in exllamav2's


@dataclass(frozen=True)
class Options:
    """`bpw` counts the layers' matrices, as exllamav2 does. `head_bits` 16: the head stays f16.

    `damp`: what is added to a Hessian's diagonal, as a share of its mean.
    """

    bpw: float
    head_bits: int = 6
    damp: float = DAMP
    n_threads: int | None = None
    device: str = "auto"  # or "cpu", "cuda"


@dataclass(frozen=True, eq=False)
class Plan:
    """All that is decided before anything is measured. `shapes`: (n_out, n_in) of the layers'
    matrices by module name, `biased`: those with a bias, `head`: the head's scheme, or None."""

    checkpoint: Checkpoint
    options: Options
    shapes: Mapping[str, tuple[int, int]]
    biased: frozenset[str]
    head: Scheme | None
    measurement: Measurement | None  # read, not to be made

    @property
    def n_weights(self) -> int:
        """As exllamav2 counts them, padding included."""
        return sum(padded(n_out) * n_in for n_out, n_in in self.shapes.values())

    @property
    def dense(self) -> set[str]:
        """The tensors that are stored as f16."""
        names = expected_tensors(self.checkpoint.spec)
        quantized = {*self.shapes, *([HEAD] if self.head is not None else [])}
        return {name for name in names if name.removesuffix(".weight") not in quantized}

    @property
    def head_shape(self) -> tuple[int, int]:
        return self.checkpoint.spec.n_vocab, self.checkpoint.spec.n_embd

    def tensors(self, schemes: Mapping[str, Scheme]) -> list[OutTensor]:
        """The directory's tensors, once every matrix has a scheme."""
        made: list[OutTensor] = []
        for name, shape in expected_tensors(self.checkpoint.spec).items():
            module = name.removesuffix(".weight")
            if module in self.shapes:
                made += _parts(module, self.shapes[module][0], schemes[module])
            elif module != HEAD or self.head is None:
                made.append(dense_tensor(name, shape, F16))
        if self.head is not None:
            made += _parts(HEAD, self.head_shape[0], self.head)
        return made

    @property
    def size_bytes(self) -> int:
        """About what the directory will take."""
        shapes = expected_tensors(self.checkpoint.spec)
        dense = sum(
            2 * int(np.prod(shape))
            for name, shape in shapes.items()
            if name.removesuffix(".weight") not in self.shapes
        )
        head = self.head.total_bits(self.head_shape[0]) // 8 if self.head else 0
        return dense + head + int(self.options.bpw * self.n_weights / 8)


def plan_exl2(checkpoint: Checkpoint, options: Options, measurement: Path | None = None) -> Plan:
    """Check the model against the format, and read the measurement if one is named.

    Raises InputError for shapes that EXL2 cannot hold, a quantized source, bits that are none or
    out of reach, and a measurement of another model.
    """
    dense_type(checkpoint)  # refuses a quantized source
    if options.head_bits not in HEAD_BITS:
        raise InputError(
            f"--head-bits {options.head_bits}: give one of {', '.join(map(str, HEAD_BITS))}"
        )
    if not 2 < options.bpw <= 8.5:
        raise InputError(f"--bpw {options.bpw:g}: give a number above 2, at most 8.5")
    expected = expected_tensors(checkpoint.spec)
    shapes: dict[str, tuple[int, int]] = {}
    for name, shape in expected.items():
        module = name.removesuffix(".weight")
        if module.endswith(LINEARS) and name != module:
            shapes[module] = (shape[0], shape[1])
    biased = frozenset(n.removesuffix(".bias") for n in expected if n.endswith(".bias"))
    for module, (n_out, n_in) in shapes.items():
        if n_in % ROWS:
            raise InputError(
                f"{module}: {n_in} inputs are no multiple of {ROWS}, which EXL2 needs; use GGUF"
            )
        if module in biased and n_out != padded(n_out):
            raise InputError(
                f"{module}: exllamav2 reads no bias of {n_out} values (a multiple of 32 is "
                "needed); use GGUF"
            )
    head = None
    if options.head_bits != 16:
        head = _head_scheme(checkpoint.spec.n_embd, options.head_bits)
        head.check(HEAD, checkpoint.spec.n_embd)
    found = None
    if measurement is not None:
        found = read_measurement(measurement, model_identity(checkpoint), shapes, biased)
    plan = Plan(checkpoint, options, shapes, biased, head, found)
    if found is not None:
        allocate(found.options, plan.n_weights, options.bpw)  # refuses a target out of reach
    else:
        sizes = [
            extremes(n_in, n_out, bias=name in biased) for name, (n_out, n_in) in shapes.items()
        ]
        check_target(sizes, plan.n_weights, options.bpw)
    return plan


def _head_scheme(n_in: int, bits: int) -> Scheme:
    group = 32 if bits < 5 else 128
    wider = [width for width in EXL2_BITS if width > bits]
    if not wider:
        return scheme_of_shares(n_in, [bits], [1], [group])
    return scheme_of_shares(n_in, [wider[0], bits], [_RICHER, 1 - _RICHER], [group, group])


def _parts(module: str, n_out: int, scheme: Scheme) -> list[OutTensor]:
    columns, groups = padded(n_out), scheme.groups()
    words = sum(-(-rows * bits // 32) for bits, rows in groups)
    return [
        OutTensor(f"{module}.q_weight", "I32", (words, columns)),
        OutTensor(f"{module}.q_scale", "I32", (len(groups), columns // 8)),
        OutTensor(f"{module}.q_scale_max", "F16", (len(groups),)),
        OutTensor(f"{module}.q_groups", "I16", (2 * len(groups),)),
        OutTensor(f"{module}.q_invperm", "I32", (scheme.n_in,)),
    ]
