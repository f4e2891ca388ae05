"""What `dsq convert --to gptq` decides before it reads a weight: each matrix's scheme and place."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
from dsq.convert.hf.quantized_dir import dense_tensor, dense_type
from dsq.convert.hf.shards import OutTensor
from dsq.convert.names import expected_tensors
from dsq.errors import InputError
from dsq.quant.gptq import Scheme
from dsq.quant.gptq_layout import Format, part_shapes
from dsq.quant.scheme import GgmlType
from dsq.quant.solver import DAMP
from dsq.runtime.decoder import STAGES
from dsq.runtime.fidelity.distill import Options as DistillOptions

LINEARS = tuple(name for names in STAGES.values() for name in names)


@dataclass(frozen=True)
class Override:
    """What a matrix whose module's name starts with a match of `pattern` has instead; None: it is
    left as it is. The first of several wins, as in GPTQModel's `dynamic`."""

    pattern: str
    bits: int | None
    group_size: int | None = None


@dataclass(frozen=True)
class Options:
    """`damp`: what is added to a Hessian's diagonal, as a share of its mean. `distill`: tune scales
    and norm gains afterwards, on `distill_tokens` of the calibration's tokens (None: on all)."""

    scheme: Scheme
    checkpoint_format: Format = "gptq"
    dynamic: tuple[Override, ...] = ()
    allow_ragged: bool = False
    damp: float = DAMP
    n_threads: int | None = None
    device: str = "auto"  # or "cpu", "cuda"
    distill: DistillOptions | None = None
    distill_tokens: int | None = None


@dataclass(frozen=True)
class Linear:
    """A matrix of a layer: Hugging Face's name of its module, (n_out, n_in), and its scheme (None:
    it is left as it is)."""

    name: str
    shape: tuple[int, int]
    scheme: Scheme | None

    def tensors(self, dense: GgmlType) -> list[OutTensor]:
        n_out, n_in = self.shape
        if self.scheme is None:
            return [dense_tensor(f"{self.name}.weight", self.shape, dense)]
        shapes = part_shapes(n_in, n_out, self.scheme.n_groups(n_in), self.scheme.bits)
        types = {"scales": "F16"}
        return [
            OutTensor(f"{self.name}.{part}", types.get(part, "I32"), shape)
            for part, shape in shapes.items()
        ]


@dataclass(frozen=True, eq=False)
class Plan:
    """All that is decided before anything is read or written."""

    checkpoint: HfCheckpoint | GgufCheckpoint
    options: Options
    dense: GgmlType  # the type of what is not quantized
    linears: Mapping[str, Linear]  # by module name
    tensors: tuple[OutTensor, ...]  # in the directory's order

    @property
    def size_bytes(self) -> int:
        return sum(t.n_bytes for t in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits a weight of the quantized matrices, scales and all."""
        quantized = [linear for linear in self.linears.values() if linear.scheme]
        n_bytes = sum(t.n_bytes for linear in quantized for t in linear.tensors(self.dense))
        return 8 * n_bytes / max(1, sum(q.shape[0] * q.shape[1] for q in quantized))


def plan_gptq(checkpoint: HfCheckpoint | GgufCheckpoint, options: Options) -> Plan:
    """Decide each matrix's scheme. Raises InputError for shapes that it does not fit, and for a
    quantized source."""
    dense = dense_type(checkpoint)
    linears: dict[str, Linear] = {}
    tensors: list[OutTensor] = []
    used: set[Override] = set()
    for name, shape in expected_tensors(checkpoint.spec).items():
        module = name.removesuffix(".weight")
        if not module.endswith(LINEARS) or name == module:
            tensors.append(dense_tensor(name, shape, dense))
            continue
        n_out, n_in = shape
        override = _override(module, options.dynamic)
        used.update([override] if override else [])
        scheme = _scheme(options.scheme, override)
        if scheme is not None:
            scheme.check(module, n_in, n_out, allow_ragged=options.allow_ragged)
        linears[module] = Linear(module, (n_out, n_in), scheme)
        tensors += linears[module].tensors(dense)
    idle = [o.pattern for o in options.dynamic if o not in used]
    if idle:
        raise InputError(
            f"--dynamic {idle[0]}: no matrix's name starts so, or an earlier one takes all; names "
            "are like model.layers.0.mlp.down_proj"
        )
    return Plan(checkpoint, options, dense, linears, tuple(tensors))


def _override(module: str, dynamic: Sequence[Override]) -> Override | None:
    return next((o for o in dynamic if re.match(o.pattern, module)), None)


def _scheme(base: Scheme, override: Override | None) -> Scheme | None:
    if override is None:
        return base
    if override.bits is None:
        return None
    group_size = base.group_size if override.group_size is None else override.group_size
    return replace(base, bits=override.bits, group_size=group_size)


def quantization_config(plan: Plan) -> dict[str, Any]:
    """What quantize_config.json and config.json's key hold, in GPTQModel's spelling."""
    options, scheme = plan.options, plan.options.scheme
    quantizer = [f"dsq:{version('dsq')}"]
    if not scheme.sym:
        # GPTQModel loads zero points of format `gptq` only with its own mark that none wraps.
        quantizer.append("gptqmodel:0.9.0")
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "desc_act": scheme.act_order,
        "sym": scheme.sym,
        "static_groups": scheme.static_groups,
        "lm_head": False,
        "checkpoint_format": options.checkpoint_format,
        "pack_dtype": "int32",
        "damp_percent": options.damp,
        "true_sequential": True,
        "meta": {
            "quantizer": quantizer,
            "damp_percent": options.damp,
            "static_groups": scheme.static_groups,
            "true_sequential": True,
        },
    }
    if options.distill is not None:
        config["meta"]["distilled"] = True
    if options.dynamic:
        config["dynamic"] = {
            f"-:{o.pattern}" if o.bits is None else f"+:{o.pattern}": {
                key: value
                for key, value in (("bits", o.bits), ("group_size", o.group_size))
                if value is not None
            }
            for o in options.dynamic
        }
    return config
