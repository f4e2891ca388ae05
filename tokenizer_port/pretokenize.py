"""How text is cut before BPE: the families of pre-tokenizers, and llama.cpp's name for each.

A tokenizer.json is recognised by the structure of its chain (normalizers, splits, flags), never
by a hash of token ids, which one token added by a fine-tune would change.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from dsq.errors import InputError, UnsupportedError
from dsq.tokenizer_port.chains import ALIASES, CHAINS, LLAMA_CPP_NAMES, NOT_BYTE_LEVEL, Chain, Step
from dsq.tokenizer_port.json_file import expect, optional
from dsq.tokenizer_port.llama_chains import LLAMA_CPP_CHAINS
from dsq.tokenizer_port.regexes import COVERING
from dsq.tokenizer_port.spelling import spelling_of

__all__ = [
    "ALIASES",
    "CHAINS",
    "LLAMA_CPP_NAMES",
    "chain_for",
    "chain_of",
    "checked_name",
    "recognise",
]


_NO_BYTES = "is no byte-level tokenizer; only byte-level BPE is supported: use llama.cpp itself"


def checked_name(pre: str) -> str:
    """A `--pre` given by the user: any name of a byte-level tokenizer that llama.cpp loads."""
    if pre in NOT_BYTE_LEVEL:
        raise UnsupportedError(f"--pre {pre}: {_NO_BYTES}")
    if pre in LLAMA_CPP_NAMES:
        return pre
    near = difflib.get_close_matches(pre, LLAMA_CPP_NAMES, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "DeepSeek Coder's is deepseek-coder"
    raise InputError(f"--pre {pre}: llama.cpp has no pre-tokenizer of this name; {hint}")


def recognise(tokenizer_json: Mapping[str, Any], where: str = "tokenizer.json") -> str:
    """llama.cpp's pre-tokenizer name for a parsed tokenizer.json; `where` names it in errors.

    Raises UnsupportedError naming the nearest known chain and the first step that differs.
    """
    chain = chain_of(tokenizer_json, where)
    for name, known in CHAINS.items():
        if chain == known:
            return name
    raise UnsupportedError(_unknown(chain, where))


def chain_of(tokenizer_json: Mapping[str, Any], where: str) -> Chain:
    """The chain of a parsed tokenizer.json. Raises InputError where it is none at all."""
    model = optional(tokenizer_json.get("model"), dict, f"{where}: model") or {}
    ignores = optional(model.get("ignore_merges"), bool, f"{where}: model.ignore_merges")
    chains = {
        key: tuple(_flatten(tokenizer_json.get(name), key, f"{where}: {name}"))
        for name, key in (("pre_tokenizer", "pretokenizers"), ("normalizer", "normalizers"))
    }
    return Chain(chains["pretokenizers"], chains["normalizers"], ignore_merges=bool(ignores))


def chain_for(pre: str, *, as_llama_cpp: bool = False) -> dict[str, Any]:
    """tokenizer.json's `normalizer`, `pre_tokenizer`, `post_processor`, `decoder` for a name.

    As the family's published file has them, if that is known. `as_llama_cpp`: as llama.cpp reads
    the name, which never normalizes and cuts some families otherwise (`llama_chains`).
    `ignore_merges` comes with them; it belongs in the file's `model`.
    """
    chain = _chain_named(pre, as_llama_cpp)
    spelling = spelling_of(pre)
    steps = [
        {**step, "trim_offsets": True} if step["type"] == "ByteLevel" else spelling.step(step)
        for step in chain.steps
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    normalizer = None if as_llama_cpp else _sequence(list(chain.normalizers), "normalizers")
    return {
        "normalizer": spelling.no_normalizer if normalizer is None else normalizer,
        "pre_tokenizer": _sequence(steps, "pretokenizers"),
        "post_processor": {**byte_level, "trim_offsets": False},
        "decoder": byte_level,
        "ignore_merges": chain.ignore_merges,
    }


def _chain_named(pre: str, as_llama_cpp: bool) -> Chain:
    name = ALIASES.get(pre, pre)
    published, other = CHAINS.get(name), LLAMA_CPP_CHAINS.get(name)
    chain = (other or published) if as_llama_cpp else (published or other)
    if chain is not None:
        return chain
    why = (
        _NO_BYTES
        if pre in NOT_BYTE_LEVEL
        else "is none that llama.cpp (of llama-cpp-python 0.3.36) knows; update dsq"
    )
    raise UnsupportedError(f"tokenizer.ggml.pre: {pre!r} {why}")


def _sequence(steps: list[Step], key: str) -> Step | None:
    if len(steps) < 2:
        return steps[0] if steps else None
    return {"type": "Sequence", key: steps}


# "Remove what lies between the matches": so Xenova's GPT-4 files are written.
_REMOVED = ("Removed", True)


def _flatten(node: Any, key: str, what: str) -> list[Step]:
    """The steps of a (nested) Sequence, each reduced to what decides where text is cut."""
    if node is None:
        return []
    expect(node, dict, what)
    if node.get("type") == "Sequence":
        what += f".{key}"
        children = expect(node.get(key), list, what)
        steps = (expect(child, dict, f"{what}: a step") for child in children)
        return [step for child in steps for step in _flatten(child, key, what)]
    step = {k: v for k, v in node.items() if k != "trim_offsets"}
    if step.get("type") == "ByteLevel":
        step = {"add_prefix_space": True, "use_regex": True, **step}
    elif step.get("type") == "Split":
        pattern = step.get("pattern")
        if isinstance(pattern, Mapping) and isinstance(pattern.get("Regex"), str):
            regex = _spell_newlines(pattern["Regex"])
            step["pattern"] = {"Regex": regex}
            if regex in COVERING and (step.get("behavior"), step.get("invert")) == _REMOVED:
                step.update(behavior="Isolated", invert=False)
    return [step]


def _spell_newlines(regex: str) -> str:
    """`[\\r\\n]` is written with escapes or with the characters themselves: one spelling."""
    return regex.replace("\r", r"\r").replace("\n", r"\n").replace("\t", r"\t")


def _unknown(chain: Chain, where: str) -> str:
    def common(name: str) -> int:
        pairs = zip(chain.all_steps(), CHAINS[name].all_steps(), strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), 10**6)

    # Of two equally near ones, that of the nearer length.
    nearest = max(
        CHAINS, key=lambda name: (common(name), -abs(len(CHAINS[name].steps) - len(chain.steps)))
    )
    at = common(nearest)
    ours, theirs = chain.all_steps(), CHAINS[nearest].all_steps()
    return (
        f"{where}: pre-tokenizer chain not known: step {at + 1} is {_describe(ours, at)}, "
        f"where the nearest known chain, {nearest}, has {_describe(theirs, at)}; "
        "if you know llama.cpp's name for it, give it with --pre NAME"
    )


def _describe(steps: list[Step], at: int) -> str:
    if at >= len(steps):
        return "nothing"
    text = json.dumps(steps[at], ensure_ascii=False)
    return text if len(text) <= 200 else text[:197] + "..."
