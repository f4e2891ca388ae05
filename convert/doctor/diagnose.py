"""All checks, in the order of the harm that they find."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dsq.convert.doctor.facts import TEMPLATE, TOKENIZER, Facts
from dsq.convert.doctor.family import Family, recognise_family
from dsq.convert.doctor.findings import Diagnosis, Finding, mended_entries
from dsq.convert.doctor.rope import check_rope
from dsq.convert.doctor.scope import areas
from dsq.convert.doctor.special_ids import check_ids
from dsq.convert.doctor.template import check_template
from dsq.convert.doctor.vocabulary import check_pre, check_types
from dsq.errors import InputError
from dsq.tokenizer_port.json_file import brief
from dsq.tokenizer_port.load import vocabulary_from_gguf
from dsq.tokenizer_port.pretokenize import checked_name
from dsq.tokenizer_port.to_hf import tokenizer_json


def diagnose(
    metadata: Mapping[str, Any],
    tensor_names: Iterable[str],
    *,
    pre: str | None = None,
    thorough: bool = True,
) -> Diagnosis:
    """What old or careless conversions got wrong in a GGUF of this metadata. Pure.

    `pre` is the pre-tokenizer by the user's word. Not `thorough`: neither is the chat template
    rendered nor the vocabulary read as a whole, which takes milliseconds in place of tens of them.
    Raises InputError for a `pre` that is none or that the file's own tokenizer denies.
    """
    facts = Facts(metadata, frozenset(tensor_names))
    if pre is not None:
        checked_name(pre)
        if not facts.is_bpe:
            raise InputError(f"--pre {pre}: the file has no byte-level BPE; leave --pre out")
    family = recognise_family(facts)
    findings = tuple(_findings(facts, family, pre, thorough))
    if thorough and facts.text(TOKENIZER + "model") == "gpt2":
        findings += tuple(_unreadable(metadata, findings))
    evidence = _evidence(facts, family)
    scope = tuple(areas(facts, family, evidence, pre))
    return Diagnosis(
        family=family.pre if family else None,
        evidence=evidence,
        findings=findings,
        examined=tuple(area.what for area in scope if area.unless is None),
        not_examined=tuple(f"{area.what} ({area.unless})" for area in scope if area.unless),
    )


def _findings(
    facts: Facts, family: Family | None, pre: str | None, thorough: bool
) -> Iterator[Finding]:
    if facts.is_bpe:
        yield from check_pre(facts, family, pre)
    yield from check_rope(facts, family)
    template = tuple(check_template(facts, family, render=thorough))
    gets_template = any(entry.key == TEMPLATE for found in template for entry in found.set)
    yield from check_ids(facts, family, gets_template=gets_template)
    yield from template
    yield from check_types(facts, family)


def _evidence(facts: Facts, family: Family | None) -> str:
    if family is not None:
        return family.evidence
    model = facts.metadata.get(TOKENIZER + "model")
    if facts.is_bpe:
        return "the vocabulary is none that dsq knows by its tokens"
    if model is None:
        return "the file has no tokenizer"
    if model == "gpt2":
        return f"{TOKENIZER}tokens is absent, empty or no list of texts"
    return f"the tokenizer is {brief(model)}, no byte-level BPE"


def _unreadable(metadata: Mapping[str, Any], findings: tuple[Finding, ...]) -> Iterator[Finding]:
    """Whatever else keeps the vocabulary from being read, after all mends."""
    types = dict.fromkeys(metadata, (0, None))  # not looked at
    mended = {entry.key: entry.value for entry in mended_entries(metadata, types, findings)}
    try:
        vocabulary = vocabulary_from_gguf(mended, pre="gpt-2")  # the name has been judged
        if vocabulary.tokenizer_json is not None:
            tokenizer_json(vocabulary)  # the arrays against the tokenizer.json inside
    except InputError as error:
        told = (found.wrong.split()[0] for found in findings if not found.mendable)
        if not any(key in str(error) for key in told):
            yield Finding(
                code="vocabulary",
                wrong=str(error),
                effect="runtimes refuse the file or crash",
                mend="none by itself: convert the model again",
            )
