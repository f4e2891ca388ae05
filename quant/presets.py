"""The presets of llama-quantize: what a user may name as TYPE.

Source: `QUANT_OPTIONS` in tools/quantize/quantize.cpp, `llama_ftype_get_default_type` in
src/llama-quant.cpp and `enum llama_ftype` in llama.h.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsq.errors import InputError
from dsq.quant.scheme import BY_NAME, GgmlType


@dataclass(frozen=True)
class Preset:
    """A mix of tensor types: `ftype` is llama.cpp's number for it (general.file_type)."""

    name: str
    ftype: int
    base: GgmlType
    note: str


def _preset(name: str, ftype: int, base: str, note: str) -> Preset:
    return Preset(name, ftype, BY_NAME[base], note)


_PRESETS = (
    _preset("f32", 0, "f32", "32 bits, exact"),
    _preset("f16", 1, "f16", "16 bits, narrow range"),
    _preset("bf16", 32, "bf16", "16 bits, what most checkpoints are stored in"),
    _preset("q8_0", 7, "q8_0", "8.5 bpw, no visible loss"),
    _preset("q6_k", 18, "q6_k", "6.6 bpw, hardly any loss"),
    _preset("q5_k_m", 17, "q5_k", "5.7 bpw mix, small loss"),
    _preset("q5_k_s", 16, "q5_k", "5.5 bpw"),
    _preset("q5_1", 9, "q5_1", "6.0 bpw, older format"),
    _preset("q5_0", 8, "q5_0", "5.5 bpw, older format"),
    _preset("q4_k_m", 15, "q4_k", "4.8 bpw mix, the usual choice"),
    _preset("q4_k_s", 14, "q4_k", "4.6 bpw"),
    _preset("iq4_nl", 25, "iq4_nl", "4.5 bpw, non-linear"),
    _preset("iq4_xs", 30, "iq4_xs", "4.25 bpw, non-linear"),
    _preset("q4_1", 3, "q4_1", "5.0 bpw, older format"),
    _preset("q4_0", 2, "q4_0", "4.5 bpw, fastest on a CPU"),
    _preset("q3_k_l", 13, "q3_k", "4.3 bpw mix"),
    _preset("q3_k_m", 12, "q3_k", "3.9 bpw mix"),
    _preset("q3_k_s", 11, "q3_k", "3.5 bpw"),
    _preset("iq3_m", 27, "iq3_s", "3.7 bpw mix"),
    _preset("iq3_s", 26, "iq3_s", "3.4 bpw"),
    _preset("iq3_xs", 22, "iq3_s", "3.3 bpw mix"),
    _preset("iq3_xxs", 23, "iq3_xxs", "3.1 bpw, needs an imatrix"),
    _preset("q2_k", 10, "q2_k", "3.0 bpw mix, large loss"),
    _preset("q2_k_s", 21, "q2_k", "2.8 bpw, needs an imatrix"),
    _preset("iq2_m", 29, "iq2_s", "2.7 bpw mix, needs an imatrix"),
    _preset("iq2_s", 28, "iq2_xs", "2.5 bpw mix, needs an imatrix"),
    _preset("iq2_xs", 20, "iq2_xs", "2.3 bpw, needs an imatrix"),
    _preset("iq2_xxs", 19, "iq2_xxs", "2.1 bpw, needs an imatrix"),
    _preset("iq1_m", 31, "iq1_m", "1.8 bpw, needs an imatrix"),
    _preset("iq1_s", 24, "iq1_s", "1.6 bpw, needs an imatrix"),
    _preset("tq2_0", 37, "tq2_0", "2.1 bpw, for ternary models"),
    _preset("tq1_0", 36, "tq1_0", "1.7 bpw, for ternary models"),
    _preset("q2_0", 41, "q2_0", "2.25 bpw, groups of 64"),
    _preset("q1_0", 40, "q1_0", "1.1 bpw"),
    _preset("mxfp4_moe", 38, "mxfp4", "MXFP4 experts, q8_0 elsewhere"),
)

PRESETS: dict[str, Preset] = {p.name: p for p in _PRESETS}
_BY_NUMBER = {str(p.ftype): p for p in _PRESETS}
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}


def preset(name: str) -> Preset:
    """The preset called `name`: any case, aliases and numbers as llama-quantize has them.

    Raises InputError, listing the names, when there is none.
    """
    key = name.lower().replace("-", "_")
    found = PRESETS.get(ALIASES.get(key, key)) or _BY_NUMBER.get(key)
    if found is None:
        raise InputError(f"unknown type {name!r}; choose one of: {', '.join(PRESETS)}")
    return found
