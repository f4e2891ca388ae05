"""Opening a GPTQ or EXL2 directory: which it is, its files, and its tensors as dense ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from dsq.convert.exl2.reader import OPTIONAL, Exl2Linears
from dsq.convert.gptq.config import FILE, GptqConfig, named, read_gptq_config
from dsq.convert.gptq.reader import GptqLinears
from dsq.convert.json_file import brief, read_object, shown
from dsq.convert.names import expected_tensors
from dsq.convert.packed import PackedLinears, drop_empty_biases, split_parts
from dsq.convert.spec import ModelSpec
from dsq.convert.tensors import TensorInfo
from dsq.convert.weight_files import Weights, open_packed_weights
from dsq.errors import InputError, UnsupportedError
from dsq.quant import exl2_layout, gptq_layout
from dsq.quant.scheme import FLOAT_TYPES

Method = Literal["gptq", "exl2"]


def packed_method(path: Path, config: Mapping[str, Any]) -> Method | None:
    """What the directory says it is; None for a dense one, or one quantized in another way.

    Raises UnsupportedError where only quantize_config.json says so, and names another way.
    """
    inline = config.get("quantization_config")
    if inline and not isinstance(inline, Mapping):
        return None
    method = named(inline or {}).get("quant_method")
    if method is None and (path / FILE).is_file():
        method = named(read_object(path / FILE)).get("quant_method", "gptq")  # AutoGPTQ's old way
        if method != "gptq":
            raise UnsupportedError(
                f"{path / FILE}: quantized by {brief(method)}, which is not supported; give a GPTQ "
                "or EXL2 directory, or the unquantized checkpoint"
            )
    if method == "exl2":
        return "exl2"
    return "gptq" if method == "gptq" else None


def has_packed_weights(path: Path) -> bool:
    """Whether there are weights under names that only packers use."""
    return (path / FILE).is_file() or any(path.glob("output*.safetensors"))


def open_packed(
    path: Path, method: Method, config: Mapping[str, Any], spec: ModelSpec
) -> tuple[ModelSpec, Weights, dict[str, TensorInfo], PackedLinears]:
    """The weights as they lie in the files, and as dense tensors.

    A tied model with a packed head is none any more: the spec says so.
    """
    if method == "gptq":
        settings = read_gptq_config(path, config)
        weights = open_packed_weights(path, _gptq_stems(settings))
        modules, dense = split_parts(path, weights.tensors, gptq_layout.PARTS)
    else:
        weights = open_packed_weights(path, ["output"])
        modules, dense = split_parts(path, weights.tensors, exl2_layout.PARTS, OPTIONAL)
    if not modules:
        raise InputError(
            f"{path}: the config says {method}, but no tensor is packed; correct the config, or "
            f"give the quantized files"
        )
    for info in dense.values():
        if info.type not in FLOAT_TYPES:
            raise InputError(
                f"{info.path}: tensor {shown(info.name)} of type {info.type} is none of a {method} "
                f"checkpoint"
            )
    if spec.tied and "lm_head" in modules:
        spec = replace(spec, tied=False)
    expected = expected_tensors(spec)
    drop_empty_biases(dense, modules, expected, weights.read)
    packed: PackedLinears
    if method == "gptq":
        packed = GptqLinears(path, settings, modules, weights.read)
    else:
        packed = Exl2Linears(path, modules, expected, weights.read)
    return spec, weights, {**dense, **packed.tensors}, packed


def _gptq_stems(config: GptqConfig) -> list[str]:
    """AutoGPTQ's names for its files; `model` is everyone's, and looked for anyway."""
    names = [config.weights_name, f"gptq_model-{config.bits}bit-{config.group_size}g"]
    return [name for name in names if name is not None and name != "model"]
