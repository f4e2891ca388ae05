"""The families of byte-level pre-tokenizers, as data; `pretokenize` recognises and rebuilds them.

What their published tokenizer.json files hold stands here; `llama_chains` has, for the names whose
files are not known, what llama.cpp does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsq.tokenizer_port.regexes import (
    BAILING,
    BLOOM,
    CJK,
    CL100K,
    DEEPSEEK_V3,
    DIGITS_1_TO_3,
    KANA,
    LATIN_LETTERS,
    LATIN_PUNCTUATION,
    NEWLINE,
    O200K,
    QWEN2,
    QWEN35,
    SEED_CODER,
    TEKKEN,
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


def split(regex: str) -> Step:
    return {
        "type": "Split",
        "pattern": {"Regex": regex},
        "behavior": "Isolated",
        "invert": False,
    }


def _digits(individual: bool) -> Step:
    return {"type": "Digits", "individual_digits": individual}


def byte_level(use_regex: bool) -> Step:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


_NFC: Step = {"type": "NFC"}

# Where several of llama.cpp's names mean one chain, the key is the name under which llama.cpp
# leaves decoded text alone (`clean_spaces` false), then the oldest; the others are in ALIASES.
# llama.cpp never normalizes: on text that is not NFC it differs from the "NFC" chains.
CHAINS: dict[str, Chain] = {
    "deepseek-coder": Chain(
        (
            split(NEWLINE),
            split(WORDS),
            split(WORDS_PUNCTUATION),
            split(CJK),
            _digits(True),
            byte_level(False),
        )
    ),
    "deepseek-llm": Chain(
        (
            split(NEWLINE),
            split(LATIN_LETTERS),
            split(LATIN_PUNCTUATION),
            split(r"\s+$"),
            split(CJK),
            _digits(True),
            byte_level(False),
        )
    ),
    "deepseek-v3": Chain(
        (split(DIGITS_1_TO_3), split(KANA), split(DEEPSEEK_V3), byte_level(False))
    ),
    "gpt-2": Chain((byte_level(True),)),
    "mpt": Chain((byte_level(True),), normalizers=(_NFC,)),
    "smollm": Chain((_digits(True), byte_level(True))),
    "command-r": Chain((_digits(True), byte_level(True)), normalizers=(_NFC,)),
    "llama-bpe": Chain((split(CL100K), byte_level(False)), ignore_merges=True),
    "dbrx": Chain((split(CL100K), byte_level(False))),
    "qwen2": Chain((split(QWEN2), byte_level(False)), normalizers=(_NFC,)),
    "deepseek-r1-qwen": Chain((split(QWEN2), byte_level(False))),
    "qwen35": Chain((split(QWEN35), byte_level(False)), normalizers=(_NFC,)),
    "seed-coder": Chain((split(SEED_CODER), byte_level(False))),
    "bailingmoe": Chain((split(BAILING), byte_level(False))),
    "gpt-4o": Chain((split(O200K), byte_level(False))),
    "llama4": Chain((split(O200K), byte_level(False)), ignore_merges=True),
    "tekken": Chain((split(TEKKEN), byte_level(False)), ignore_merges=True),
    "poro-chat": Chain((split(BLOOM), byte_level(False))),
    "falcon": Chain(
        (
            {"type": "Punctuation", "behavior": "Contiguous"},
            byte_level(True),
            _digits(False),
            split("[0-9][0-9][0-9]"),
        )
    ),
}

# llama.cpp's other names for the same cutting (one `case` of llm_tokenizer_bpe, one set of flags).
ALIASES: dict[str, str] = {
    alias: name
    for name, aliases in {
        "smollm": "starcoder refact codeshell exaone minerva-7b mellum2",
        "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano "
        "glm4 glm5",
        "dbrx": "smaug-bpe chatglm-bpe",
        "gpt-2": "phi-2 mellum modern-bert exaone4 gigachat a.x-4.0 jais trillion granite-docling "
        "jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code roberta-bpe",
        "mpt": "olmo",
        "deepseek-r1-qwen": "hunyuan stablelm2 megrez solar-open grok-2 kormo f2llmv2",
        "deepseek-v3": "hunyuan-dense joyai-llm hy_v4",
        "bailingmoe": "bailingmoe2 llada-moe",
        "gpt-4o": "kanana2 talkie minimax-m2",
        "poro-chat": "bloom gpt3-finnish",
        "tiny_aya": "cohere2moe",  # in llama_chains
    }.items()
    for alias in aliases.split()
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

# Of these, the BPE tokenizers that work on UTF-8 text itself: not byte-level, not supported.
NOT_BYTE_LEVEL: frozenset[str] = frozenset(
    ("gemma4", "granite-embed-multi-311m", "sarvam-moe", "whitespace")
)
