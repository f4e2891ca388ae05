"""How text is cut before BPE: the families of pre-tokenizers, and llama.cpp's name for each.

A tokenizer.json is recognised by the structure of its chain (normalizers, splits, flags), never
by a hash of token ids, which one token added by a fine-tune would change.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsq.errors import InputError, UnsupportedError
from dsq.tokenizer_port.json_file import expect, optional
from dsq.tokenizer_port.regexes import (
    BAILING,
    CJK,
    CL100K,
    DEEPSEEK_V3,
    DIGITS_1_TO_3,
    KANA,
    LATIN_LETTERS,
    LATIN_PUNCTUATION,
    NEWLINE,
    QWEN2,
    QWEN35,
    SEED_CODER,
    WORDS,
    WORDS_PUNCTUATION,
)

Step = dict[str, Any]


@dataclass(frozen=True)
class Chain:
    """What happens to text before BPE, in order; steps as in tokenizer.json, defaults spelled."""

    steps: tuple[Step, ...]  # pre-tokenizers, the last one ByteLevel
    normalizers: tuple[Step, ...] = ()
    ignore_merges: bool = False  # a piece that is itself a token is taken whole (Llama 3)

    def all_steps(self) -> list[Step]:
        merges: Step = {"type": "ignore_merges", "value": self.ignore_merges}
        return [*self.normalizers, *self.steps, merges]


def _split(regex: str) -> Step:
    return {
        "type": "Split",
        "pattern": {"Regex": regex},
        "behavior": "Isolated",
        "invert": False,
    }


def _digits(individual: bool) -> Step:
    return {"type": "Digits", "individual_digits": individual}


def _byte_level(use_regex: bool) -> Step:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


_NFC: Step = {"type": "NFC"}

# Where several of llama.cpp's names mean one chain, the key is the name under which llama.cpp
# leaves decoded text alone (`clean_spaces` false), then the oldest; the others are in ALIASES.
# llama.cpp never normalizes: on text that is not NFC it differs from the "NFC" chains.
CHAINS: dict[str, Chain] = {
    "deepseek-coder": Chain(
        (
            _split(NEWLINE),
            _split(WORDS),
            _split(WORDS_PUNCTUATION),
            _split(CJK),
            _digits(True),
            _byte_level(False),
        )
    ),
    "deepseek-llm": Chain(
        (
            _split(NEWLINE),
            _split(LATIN_LETTERS),
            _split(LATIN_PUNCTUATION),
            _split(r"\s+$"),
            _split(CJK),
            _digits(True),
            _byte_level(False),
        )
    ),
    "deepseek-v3": Chain(
        (_split(DIGITS_1_TO_3), _split(KANA), _split(DEEPSEEK_V3), _byte_level(False))
    ),
    "gpt-2": Chain((_byte_level(True),)),
    "mpt": Chain((_byte_level(True),), normalizers=(_NFC,)),
    "smollm": Chain((_digits(True), _byte_level(True))),
    "command-r": Chain((_digits(True), _byte_level(True)), normalizers=(_NFC,)),
    "llama-bpe": Chain((_split(CL100K), _byte_level(False)), ignore_merges=True),
    "dbrx": Chain((_split(CL100K), _byte_level(False))),
    "qwen2": Chain((_split(QWEN2), _byte_level(False)), normalizers=(_NFC,)),
    "deepseek-r1-qwen": Chain((_split(QWEN2), _byte_level(False))),
    "qwen35": Chain((_split(QWEN35), _byte_level(False)), normalizers=(_NFC,)),
    "seed-coder": Chain((_split(SEED_CODER), _byte_level(False))),
    "bailingmoe": Chain((_split(BAILING), _byte_level(False))),
    "falcon": Chain(
        (
            {"type": "Punctuation", "behavior": "Contiguous"},
            _byte_level(True),
            _digits(False),
            _split("[0-9][0-9][0-9]"),
        )
    ),
}

# llama.cpp's other names for the same cutting (one `case` of llm_tokenizer_bpe, one set of flags).
ALIASES: dict[str, str] = {
    "starcoder": "smollm",
    "refact": "smollm",
    "codeshell": "smollm",
    "exaone": "smollm",
    "minerva-7b": "smollm",
    "mellum2": "smollm",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe",
    "falcon-h1": "llama-bpe",
    "pixtral": "llama-bpe",
    "midm-2.0": "llama-bpe",
    "lfm2": "llama-bpe",
    "glm4": "llama-bpe",
    "smaug-bpe": "dbrx",
    "chatglm-bpe": "dbrx",
    "phi-2": "gpt-2",
    "mellum": "gpt-2",
    "modern-bert": "gpt-2",
    "exaone4": "gpt-2",
    "gigachat": "gpt-2",
    "a.x-4.0": "gpt-2",
    "jais": "gpt-2",
    "trillion": "gpt-2",
    "olmo": "mpt",
    "hunyuan": "deepseek-r1-qwen",
    "stablelm2": "deepseek-r1-qwen",
    "megrez": "deepseek-r1-qwen",
    "solar-open": "deepseek-r1-qwen",
    "grok-2": "deepseek-r1-qwen",
    "hunyuan-dense": "deepseek-v3",
    "joyai-llm": "deepseek-v3",
    "bailingmoe2": "bailingmoe",
    "llada-moe": "bailingmoe",
}

# The names under which llama.cpp adds BOS although a file does not say so.
ADDS_BOS_UNSAID: frozenset[str] = frozenset(
    (
        *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0"),
        *("lfm2", "jina-v5-nano", "tekken", "chameleon"),
    )
)

# Every name that llama.cpp (as of llama-cpp-python 0.3.36) loads; another one it refuses.
LLAMA_CPP_NAMES: frozenset[str] = frozenset(
    """
    a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe
    command-r dbrx deepseek-coder deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone
    exaone-moe exaone4 f2llmv2 falcon falcon-h1 falcon3 gemma4 gigachat glm4 glm5 gpt-2 gpt-4o
    gpt3-finnish granite-docling granite-embed-multi-311m granite-embed-multi-97m grok-2 hunyuan
    hunyuan-dense hy_v4 jais jais-2 jina-de jina-es jina-v1-en jina-v2-code jina-v2-de jina-v2-es
    jina-v5-nano joyai-llm kanana2 kimi-k2 kormo laguna lfm2 llada-moe llama-bpe llama-v3 llama3
    llama4 megrez mellum mellum2 midm-2.0 minerva-7b minicpm5 minimax-m2 modern-bert mpt olmo
    phi-2 pixtral poro-chat qwen2 qwen35 refact roberta-bpe sarvam-moe seed-coder smaug-bpe smollm
    solar-open spark2_5 stablelm2 starcoder superbpe talkie tekken tiny_aya trillion ufakzeka
    viking whitespace youtu
    """.split()
)


def known_names() -> list[str]:
    """The names whose chain dsq can recognise or rebuild."""
    return sorted((*CHAINS, *ALIASES))


def checked_name(pre: str) -> str:
    """A `--pre` given by the user: any name that llama.cpp loads."""
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


def chain_for(pre: str) -> dict[str, Any]:
    """tokenizer.json's `normalizer`, `pre_tokenizer`, `post_processor`, `decoder` for a name.

    `ignore_merges` comes with them; it belongs in the file's `model`.
    """
    chain = CHAINS.get(ALIASES.get(pre, pre))
    if chain is None:
        raise UnsupportedError(
            f"tokenizer.ggml.pre: {pre!r} is no pre-tokenizer that dsq can rebuild; it knows "
            f"{', '.join(known_names())}: keep the model's own tokenizer.json beside it"
        )
    trimmed = [
        {**step, "trim_offsets": True} if step["type"] == "ByteLevel" else step
        for step in chain.steps
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "normalizer": _sequence(list(chain.normalizers), "normalizers"),
        "pre_tokenizer": _sequence(trimmed, "pretokenizers"),
        "post_processor": {**byte_level, "trim_offsets": False},
        "decoder": byte_level,
        "ignore_merges": chain.ignore_merges,
    }


def _sequence(steps: list[Step], key: str) -> Step | None:
    if len(steps) < 2:
        return steps[0] if steps else None
    return {"type": "Sequence", key: steps}


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
            step["pattern"] = {"Regex": _spell_newlines(pattern["Regex"])}
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
