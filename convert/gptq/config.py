"""How a GPTQ checkpoint says it was quantized: config.json and quantize_config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from dsq.convert.json_file import brief, read_object
from dsq.errors import InputError, UnsupportedError
from dsq.quant.gptq_layout import GPTQ_BITS, Format

FILE = "quantize_config.json"
_INLINE = "config.json: quantization_config"
# What two files of one model cannot disagree about. What they say of how the weights were found
# (damping, data sets, …) changes nothing in how they are read.
_SAME = ("quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format", "dynamic")
_FORMATS = ("gptq", "gptq_v2")


@dataclass(frozen=True)
class Rule:
    """An entry of GPTQModel's `dynamic`: the first whose pattern matches a module name counts."""

    pattern: re.Pattern[str]
    is_left_dense: bool
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class GptqConfig:
    """`group_size` −1 is one group for all inputs. `producer` is GPTQModel's `meta.quantizer`."""

    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    checkpoint_format: Format
    rules: tuple[Rule, ...]
    producer: str
    weights_name: str | None  # AutoGPTQ's model_file_base_name
    file: str  # what says so, for messages

    def of_module(self, module: str) -> tuple[int, int] | None:
        """Bits and group size of a module; None when it is left dense."""
        for rule in self.rules:
            if rule.pattern.match(module):
                if rule.is_left_dense:
                    return None
                return (
                    _integer(self.file, rule.settings, "bits", self.bits),
                    _integer(self.file, rule.settings, "group_size", self.group_size),
                )
        return self.bits, self.group_size

    @property
    def zeros_borrow(self) -> bool:
        """Whether a zero of 0 took its one from the neighbour: see `gptq_layout.unpack`."""
        return self.checkpoint_format == "gptq" and "gptqmodel" in self.producer.lower()


def read_gptq_config(path: Path, config: Mapping[str, Any]) -> GptqConfig:
    """The settings of the directory `path`, whose config.json is `config`.

    Raises InputError when config.json and quantize_config.json disagree, naming both.
    """
    inline = config.get("quantization_config")
    beside = read_object(path / FILE) if (path / FILE).is_file() else None
    if not isinstance(inline, Mapping):
        inline = None
    said = {_INLINE: inline, FILE: beside}
    files = {name: named(content) for name, content in said.items() if content is not None}
    if not files:
        raise InputError(f"{path}: neither {_INLINE} nor {FILE} says how it is quantized")
    if len(files) == 2:
        _check_same(path, files)
    merged: dict[str, Any] = {}
    for content in files.values():
        merged |= content
    file = next(iter(files))
    said_by = f"{path}: {file}"
    checkpoint_format = merged.get("checkpoint_format", "gptq")
    if checkpoint_format not in _FORMATS:
        raise UnsupportedError(
            f"{said_by}: checkpoint_format {brief(checkpoint_format)} is not supported "
            f"(supported: {', '.join(_FORMATS)})"
        )
    bits = _integer(said_by, merged, "bits")
    if bits not in GPTQ_BITS:
        raise UnsupportedError(
            f"{said_by}: {bits} bits are not supported "
            f"(supported: {', '.join(map(str, GPTQ_BITS))})"
        )
    meta = merged.get("meta")
    name = merged.get("model_file_base_name")
    return GptqConfig(
        bits=bits,
        group_size=_integer(said_by, merged, "group_size", -1),
        sym=bool(merged.get("sym", True)),
        desc_act=bool(merged.get("desc_act", False)),
        checkpoint_format=cast(Format, checkpoint_format),
        rules=_rules(said_by, merged.get("dynamic")),
        producer=str(meta.get("quantizer", "")) if isinstance(meta, Mapping) else "",
        weights_name=name if isinstance(name, str) and Path(name).name == name else None,
        file=file,
    )


def named(content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings under one set of names; null says nothing."""
    kept = {key: value for key, value in content.items() if value is not None}
    for old, new in (("format", "checkpoint_format"), ("method", "quant_method")):
        if new not in kept and old in kept:
            kept[new] = kept[old]
    return kept


def _check_same(path: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    (first, a), (second, b) = files.items()
    for key in _SAME:
        if key in a and key in b and a[key] != b[key]:
            raise InputError(
                f"{path}: {first} says {key} {brief(a[key])}, {second} says {brief(b[key])}; one "
                f"of them belongs to another model: correct or remove it"
            )


def _rules(said_by: str, dynamic: Any) -> tuple[Rule, ...]:
    """GPTQModel's `dynamic`: {"+:REGEX" or "REGEX": settings, "-:REGEX": {}}."""
    if dynamic is None:
        return ()
    if not isinstance(dynamic, Mapping):
        raise InputError(f"{said_by}: dynamic is {brief(dynamic)}; expected an object")
    rules = []
    for pattern, settings in dynamic.items():
        if not isinstance(settings, Mapping):
            raise InputError(f"{said_by}: dynamic {brief(pattern)} is no object")
        bare = pattern[2:] if pattern.startswith(("+:", "-:")) else pattern
        try:
            compiled = re.compile(bare)
        except re.error as error:
            raise InputError(f"{said_by}: dynamic {brief(pattern)}: {error}") from None
        rules.append(Rule(compiled, pattern.startswith("-:"), settings))
    return tuple(rules)


def _integer(said_by: str, content: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = content.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{said_by}: {key} is {brief(value)}; expected an integer")
    return value
