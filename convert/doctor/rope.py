"""RoPE: the base and the factor of DeepSeek Coder, and for every family the factor's old key.

How llama.cpp reads the keys: `llama-model.cpp` (rope_freq_base, rope_scaling, ropescale).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from dsq.convert.doctor.facts import Facts
from dsq.convert.doctor.family import Family, coder_size
from dsq.convert.doctor.findings import Finding
from dsq.convert.gguf.metadata import F32, STRING, U32, KeyValue
from dsq.convert.names import ROPE_FREQS

CODER_BASE, CODER_FACTOR, CODER_CONTEXT = 100000.0, 4.0, 16384
_TRAINED = 4096  # DeepSeek Coder's context before scaling


def check_rope(facts: Facts, family: Family | None) -> Iterator[Finding]:
    lost = None
    if has_coder_rope(facts, family):
        yield from _base(facts)
        lost = _coder_scaling(facts)
        if lost is not None:
            yield lost
    yield from _old_key(facts, moved=lost is None)
    if has_coder_rope(facts, family):
        yield from _context(facts)


def has_coder_rope(facts: Facts, family: Family | None) -> bool:
    """Llama's graph, DeepSeek Coder's vocabulary, and none of the later ways to scale."""
    return (
        family is not None
        and family.pre == "deepseek-coder"
        and facts.arch == "llama"
        and _kind(facts) in ("linear", "none", None)
        and ROPE_FREQS not in facts.tensor_names
    )


def _kind(facts: Facts) -> str | None:
    """`rope.scaling.type` as llama.cpp takes it; None for one that it does not know."""
    key = f"{facts.arch}.rope.scaling.type"
    if key not in facts.metadata:
        return "linear"
    kind = facts.text(key)
    return kind if kind in ("none", "linear", "yarn", "longrope") else None


def _factor(facts: Facts) -> float | None:
    """The factor that llama.cpp takes: under the new key, or else under the old one."""
    new = f"{facts.arch}.rope.scaling.factor"
    return facts.number(new) if new in facts.metadata else _old_factor(facts)


def _old_factor(facts: Facts) -> float | None:
    return facts.number(f"{facts.arch}.rope.scale_linear")


def _shapes(facts: Facts) -> tuple[str, bool]:
    """How the shapes speak for DeepSeek Coder, and whether that is sure."""
    size = coder_size(facts)
    if size is not None:
        return f"the vocabulary and the widths are DeepSeek Coder {size}'s", True
    return "the vocabulary is DeepSeek Coder's, the widths are none of its published models", False


def _base(facts: Facts) -> Iterator[Finding]:
    key = f"{facts.arch}.rope.freq_base"
    value = facts.number(key)
    if value is not None and math.isclose(value, CODER_BASE, rel_tol=1e-6):
        return
    said = f"is {value:g}" if value is not None else "is absent, which means 10000"
    because, sure = _shapes(facts)
    yield Finding(
        code="rope_base",
        wrong=f"{key} {said}; {because}, trained with 100000",
        effect="positions turn by wrong angles: answers get worse, the more the longer the text",
        mend=f"set {key} to 100000",
        sure=sure and value in (None, 10000.0),
        set=(KeyValue(key, CODER_BASE, F32),),
    )


def _coder_scaling(facts: Facts) -> Finding | None:
    prefix = f"{facts.arch}.rope.scaling"
    factor, kind = _factor(facts), _kind(facts)
    context = facts.number(f"{facts.arch}.context_length") or 0
    if kind == "linear" and factor is not None:
        # A fine-tune for a longer context than DeepSeek's own has a larger factor by design.
        longer = factor > CODER_FACTOR and context == _TRAINED * factor
        if factor == CODER_FACTOR or longer:
            return None
    said = "is absent" if factor is None else f"is {factor:g}"
    if kind == "none":
        said += " and the type is none"
    elif kind is None:
        said += f" and the type is {facts.metadata[f'{prefix}.type']!r}, which llama.cpp refuses"
    because, sure = _shapes(facts)
    return Finding(
        code="rope_scaling",
        wrong=f"the RoPE factor {said}; {because}, trained with linear scaling, factor 4",
        effect="positions run four times too fast: newlines, repetition or noise",
        mend=f"set {prefix}.type to linear and {prefix}.factor to 4",
        sure=sure,
        set=(
            KeyValue(f"{prefix}.type", "linear", STRING),
            KeyValue(f"{prefix}.factor", CODER_FACTOR, F32),
        ),
    )


def _old_key(facts: Facts, *, moved: bool) -> Iterator[Finding]:
    """`moved`: the old value goes under the new keys, unless they are there or mended anyway."""
    old, prefix = f"{facts.arch}.rope.scale_linear", f"{facts.arch}.rope.scaling"
    if old not in facts.metadata:
        return
    value = _old_factor(facts)
    entries: tuple[KeyValue, ...] = ()
    mend = f"remove {old}"
    says_factor = value is not None and math.isfinite(value) and value not in (0.0, 1.0)
    if moved and says_factor and f"{prefix}.factor" not in facts.metadata:
        entries = (KeyValue(f"{prefix}.factor", value, F32),)
        if f"{prefix}.type" not in facts.metadata:
            entries = (KeyValue(f"{prefix}.type", "linear", STRING), *entries)
        mend = f"move it to {prefix}.type and {prefix}.factor"
    yield Finding(
        code="rope_old_key",
        wrong=f"{old}, the RoPE factor's key before November 2023, is there",
        effect="llama.cpp still reads it, unless the new key is beside it; other runtimes lose it",
        mend=mend,
        serious=False,
        set=entries,
        delete=(old,),
    )


def _context(facts: Facts) -> Iterator[Finding]:
    size = coder_size(facts)
    key = f"{facts.arch}.context_length"
    value = facts.number(key)
    if size is None or (value is not None and value >= CODER_CONTEXT):
        return
    said = "is absent" if value is None else f"is {value:g}"
    yield Finding(
        code="context_length",
        wrong=f"{key} {said}; DeepSeek Coder {size} has a context of 16384",
        effect="runtimes refuse or warn of a context that the model can hold",
        mend=f"set {key} to 16384",
        serious=value is None,
        set=(KeyValue(key, CODER_CONTEXT, U32),),
    )
