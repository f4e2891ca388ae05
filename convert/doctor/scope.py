"""What a diagnosis looks at in a file and what it does not: silence is no proof of health.

Here and not in the checks, because a check that does not apply yields nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from dsq.convert.doctor.facts import TEMPLATE, Facts
from dsq.convert.doctor.family import EOT, Family, coder_size
from dsq.convert.doctor.rope import has_coder_rope
from dsq.convert.doctor.vocabulary import embedded_pre


class Area(NamedTuple):
    what: str
    unless: str | None = None  # why it is not examined


def areas(facts: Facts, family: Family | None, evidence: str, pre: str | None) -> Iterator[Area]:
    """`evidence` says why the family is known or not; `pre` is the user's word."""
    if facts.is_bpe:
        yield from _tokenizer(facts, family, pre)
    else:
        yield Area("pre-tokenizer, special ids, token types, vocabulary", evidence)
    yield _template(facts, family)
    yield from _rope(facts, family)


def _tokenizer(facts: Facts, family: Family | None, pre: str | None) -> Iterator[Area]:
    unknown = "the family is not recognised"
    if pre or family or embedded_pre(facts):
        yield Area("pre-tokenizer")
    else:
        yield Area("that llama.cpp knows the pre-tokenizer's name")
        yield Area("whether the pre-tokenizer is the model's", f"{unknown}, and no --pre given")
    if family is not None and family.is_deepseek:
        yield Area("special ids")
    else:
        yield Area("that special ids are tokens")
        yield Area("whether special ids are the model's", "they are known of DeepSeek's only")
    yield Area("token types")
    yield Area("vocabulary")


def _template(facts: Facts, family: Family | None) -> Area:
    known = family is not None and family.pre == "deepseek-coder" and EOT in facts.index
    if TEMPLATE in facts.metadata or known:
        return Area("chat template")
    return Area("chat template", "there is none, and whether the model has one is not known")


def _rope(facts: Facts, family: Family | None) -> Iterator[Area]:
    if has_coder_rope(facts, family):
        yield Area("RoPE")
        unpublished = "the widths are none of DeepSeek Coder's published models"
        yield Area("context length", None if coder_size(facts) else unpublished)
        return
    yield Area("RoPE's old key")
    why = "they are known of DeepSeek Coder only"
    if family is not None and family.pre == "deepseek-coder":
        why = "the architecture or the kind of scaling is not DeepSeek Coder's"
    yield Area("RoPE values, context length", why)
