"""BOS, EOS, end of turn, padding and fill-in-the-middle ids, and whether BOS is added.

What llama.cpp takes when a key is absent or out of range: `llama_vocab::impl::load`.
"""

from __future__ import annotations

from collections.abc import Iterator

from dsq.convert.doctor.facts import HF_JSON, TEMPLATE, TOKENIZER, Facts
from dsq.convert.doctor.family import BOS, EOS, EOT, Family, is_control_text, variant
from dsq.convert.doctor.findings import Finding
from dsq.convert.gguf.metadata import BOOL, U32, KeyValue
from dsq.errors import InputError
from dsq.tokenizer_port import special
from dsq.tokenizer_port.chains import ADDS_BOS_UNSAID
from dsq.tokenizer_port.definition import processors
from dsq.tokenizer_port.json_file import brief, parse_object

# llama.cpp's key for each part, and the one before September 2024, which it reads last.
_FIM_KEYS = (("fim_pre", "prefix"), ("fim_suf", "suffix"), ("fim_mid", "middle"))


def _key(name: str) -> str:
    return f"{TOKENIZER}{name}_token_id"


def _said(facts: Facts, name: str) -> str:
    """`is absent`, `is 32014 (<|EOT|>)`, `is 40000, but there are 32256 tokens`"""
    if not facts.has_id(name):
        return "is absent"
    row = facts.id(name)
    if row is None:
        return f"is {brief(facts.metadata[_key(name)])}, but there are {len(facts.tokens)} tokens"
    return f"is {row} ({brief(facts.tokens[row])[1:-1]})"


def _set_id(name: str, row: int) -> tuple[KeyValue, ...]:
    return (KeyValue(_key(name), row, U32),)


def _name_of(facts: Facts, row: int) -> str:
    return f"{row} ({brief(facts.tokens[row])[1:-1]})"


def check_ids(facts: Facts, family: Family | None, *, gets_template: bool) -> Iterator[Finding]:
    """`gets_template`: DeepSeek's chat template will be put in, which ends turns with <|EOT|>."""
    if not facts.is_bpe:
        return
    yield from _bos(facts, family)
    yield from _add_bos(facts, family)
    yield from _eos(facts, family, gets_template)
    yield from _eot(facts, family, gets_template)
    yield from _fim(facts)
    yield from _padding(facts, family)


def _deepseek(facts: Facts, family: Family | None, text: str) -> int | None:
    """The id of one of DeepSeek's own tokens."""
    return facts.index.get(text) if family is not None and family.is_deepseek else None


def _bos(facts: Facts, family: Family | None) -> Iterator[Finding]:
    right, row = _deepseek(facts, family, BOS), facts.id("bos")
    if row is not None and right in (None, row):
        return
    if right is None and not facts.has_id("bos") and not _adds_bos(facts):
        return  # a model without BOS
    yield Finding(
        code="bos",
        wrong=f"{_key('bos')} {_said(facts, 'bos')}",
        effect="every prompt begins with another token than in training"
        + (" (llama.cpp takes token 11)" if row is None else ""),
        mend=_by_hand("bos") if right is None else f"set it to {_name_of(facts, right)}",
        set=() if right is None else _set_id("bos", right),
    )


def _by_hand(name: str) -> str:
    return (
        "none by itself: the family is not recognised; convert the model again with the right "
        f"{name}_token in its tokenizer_config.json"
    )


def _adds_bos(facts: Facts) -> bool:
    """Whether llama.cpp adds BOS, said or unsaid."""
    said = facts.metadata.get(TOKENIZER + "add_bos_token")
    if isinstance(said, bool):
        return said
    return facts.text(TOKENIZER + "pre") in ADDS_BOS_UNSAID


def _add_bos(facts: Facts, family: Family | None) -> Iterator[Finding]:
    key = TOKENIZER + "add_bos_token"
    said = facts.metadata.get(key)
    right = family is not None and family.is_deepseek
    why = "DeepSeek's models are trained with it"
    if not right and not isinstance(said, bool):
        right = _template_adds_bos(facts) and not _adds_bos(facts)
        why = f"{HF_JSON} adds it"
    if not right or said is True:
        return
    yield Finding(
        code="add_bos",
        wrong=f"{key} {'is absent' if said is None else f'is {brief(said)}'}; {why}",
        effect="prompts come without BOS, and the first answers are worse for it",
        mend=f"set {key} to true",
        set=(KeyValue(key, True, BOOL),),
    )


def _template_adds_bos(facts: Facts) -> bool:
    """Whether the post-processor of the tokenizer.json inside begins with a special token."""
    text = facts.text(HF_JSON)
    if text is None:
        return False
    try:
        steps = processors(parse_object(text, HF_JSON), HF_JSON)
    except InputError:
        return False
    singles = [step["single"] for step in steps if step.get("type") == "TemplateProcessing"]
    return any(len(single) > 1 and "SpecialToken" in single[0] for single in singles)


def _ends_with_eot(facts: Facts, gets_template: bool) -> bool:
    """Whether the chat template, now or after the mend, ends a turn with <|EOT|>."""
    return gets_template or EOT in (facts.text(TEMPLATE) or "")


def _eos(facts: Facts, family: Family | None, gets_template: bool) -> Iterator[Finding]:
    row = facts.id("eos")
    end, eot = _deepseek(facts, family, EOS), _deepseek(facts, family, EOT)
    if end is None:
        if row is None:
            yield Finding(
                code="eos",
                wrong=f"{_key('eos')} {_said(facts, 'eos')}",
                effect="llama.cpp takes token 11 instead: answers break off or never end",
                mend=_by_hand("eos"),
            )
        return
    kind = variant(facts)
    instruct = eot is not None and (kind.instruct or gets_template)
    own = row is not None and row not in (end, eot) and is_control_text(facts.tokens[row])
    if own or (instruct and row == end and not _ends_with_eot(facts, gets_template)):
        return  # a fine-tune with a chat format of its own
    right = eot if instruct and eot is not None else end
    if row == right:
        return
    said = f"{_key('eos')} {_said(facts, 'eos')}"
    if row == end:
        wrong = f"{said}, as in early uploads of instruct models; {kind.why}"
        effect = f"a chat runs on behind its answer, unless the runtime knows {EOT}"
        serious = facts.id("eot") != eot
    elif row == eot:
        wrong = f"{said}, the instruct model's; {kind.why}"
        effect = "a runtime that stops on it alone writes on behind the end of a file"
        serious = False
    else:
        wrong, serious = said, True
        effect = "answers and completions break off at a word, or do not end"
    yield Finding(
        code="eos",
        wrong=wrong,
        effect=effect,
        mend=f"set it to {_name_of(facts, right)}, {'an instruct' if instruct else 'a base'} "
        "model's",
        serious=serious,
        sure=kind.sure,
        set=_set_id("eos", right),
    )


def _eot(facts: Facts, family: Family | None, gets_template: bool) -> Iterator[Finding]:
    if facts.id("eot") is not None:
        return
    right = _deepseek(facts, family, EOT)
    if right is None and not facts.has_id("eot"):
        return  # llama.cpp finds the other families' by their texts
    if right is None:
        right = special.find_end_of_turn(facts.index)
    needed = _ends_with_eot(facts, gets_template) and facts.id("eos") != right
    entries = () if right is None else _set_id("eot", right)
    yield Finding(
        code="eot",
        wrong=f"{_key('eot')} {_said(facts, 'eot')}",
        effect="llama.cpp takes the end of a text for the end of a turn"
        + (": a chat runs on behind its answer" if needed else ""),
        mend=f"set it to {_name_of(facts, right)}" if right is not None else "remove it",
        serious=needed,
        set=entries,
        delete=() if entries else (_key("eot"),),
    )


def _fim(facts: Facts) -> Iterator[Finding]:
    right = special.find_fim(facts.index)
    if right[0] is None:
        return
    # llama.cpp reads the old name last, so it wins.
    taken = [
        facts.id(old) if facts.id(old) is not None else facts.id(new) for new, old in _FIM_KEYS
    ]
    families = [tuple(map(facts.index.get, family)) for family in special.FIM_FAMILIES]
    if None not in taken and tuple(taken) in families:
        return
    names = [name for pair in _FIM_KEYS for name in pair if facts.has_id(name)]
    wrong = ", ".join(f"{_key(name)} {_said(facts, name)}" for name in names)
    # llama.cpp finds by its text what no key names.
    serious = any(row not in (None, want) for row, want in zip(taken, right, strict=True))
    swapped = sorted(filter(None, taken)) == sorted(filter(None, right))
    yield Finding(
        code="fim",
        wrong=f"{wrong}{': swapped' if swapped else ''}"
        if serious
        else f"{taken.count(None)} of the 3 fill-in-the-middle ids are absent or no tokens",
        effect=(
            "fill-in-the-middle prompts are built in the wrong order, and the answers are nonsense"
            if serious
            else "runtimes that read the keys alone, and older llama.cpp, cannot fill in the middle"
        ),
        mend="set prefix, suffix, middle to "
        + ", ".join(_name_of(facts, row) for row in right if row is not None),
        serious=serious,
        set=tuple(
            entry
            for (new, _), row in zip(_FIM_KEYS, right, strict=True)
            if row is not None
            for entry in _set_id(new, row)
        ),
        delete=tuple(_key(old) for _, old in _FIM_KEYS if facts.has_id(old)),
    )


def _padding(facts: Facts, family: Family | None) -> Iterator[Finding]:
    right = _deepseek(facts, family, EOS)
    if facts.id("padding") is not None or (right is None and not facts.has_id("padding")):
        return
    yield Finding(
        code="padding",
        wrong=f"{_key('padding')} {_said(facts, 'padding')}",
        effect="programs that run several texts at once or train cannot pad, or pad with a word",
        mend=f"set it to {_name_of(facts, right)}" if right is not None else "remove it",
        serious=False,
        set=() if right is None else _set_id("padding", right),
        delete=(_key("padding"),) if right is None else (),
    )
