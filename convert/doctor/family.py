"""Which model family a vocabulary is: by a run of tokens that no other one has.

Ids do not count, so that a fine-tune with more tokens, and a model in miniature, are recognised.
Facts of DeepSeek's models: their published configs and tokenizers; see also docs/doctor.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dsq.convert.doctor.facts import TEMPLATE, Facts
from dsq.tokenizer_port import special

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
EOT = "<|EOT|>"
FIM = ("<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>")

# Bytes that UTF-8 never uses have no symbol in the vocabulary; their letters are added tokens.
CODER_LETTERS = "õ÷ÁýÀÿøúþüùöû"
LLM_LETTERS = "øöúÿõ÷ûýÀùÁþü"


@dataclass(frozen=True)
class Family:
    """A known vocabulary. `letters` are its added single letters, by id."""

    pre: str  # llama.cpp's name of the pre-tokenizer
    evidence: str
    letters: tuple[int, ...] = ()

    @property
    def is_deepseek(self) -> bool:
        return self.pre.startswith("deepseek")


def recognise_family(facts: Facts) -> Family | None:
    """The family by its tokens, or None."""
    if not facts.is_bpe:
        return None
    start = _run(facts, (*CODER_LETTERS, BOS, EOS, *FIM))
    if start is not None:
        return Family(
            "deepseek-coder",
            f"13 letters, {BOS}, {EOS} and the FIM markers in a row, from {start} on",
            tuple(range(start, start + len(CODER_LETTERS))),
        )
    start = _run(facts, (BOS, EOS, *LLM_LETTERS))
    if start is not None:
        return Family(
            "deepseek-llm",
            f"{BOS}, {EOS} and 13 letters in a row, from {start} on",
            tuple(range(start + 2, start + 2 + len(LLM_LETTERS))),
        )
    llama3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>")
    if all(text in facts.index for text in llama3):
        return Family("llama-bpe", "the markers of Llama 3")
    return None


def _run(facts: Facts, texts: tuple[str, ...]) -> int | None:
    """Where `texts` stand in a row, or None."""
    start = facts.index.get(texts[0])
    if start is None or facts.tokens[start : start + len(texts)] != list(texts):
        return None
    return start


@dataclass(frozen=True)
class Variant:
    """`instruct` models end a turn with <|EOT|>; a fine-tune may have a template of its own."""

    instruct: bool
    why: str
    sure: bool = True


def variant(facts: Facts) -> Variant:
    """Base or instruct, by template, then name, then end of sequence."""
    template = facts.text(TEMPLATE) or ""
    if EOT in template:
        return Variant(True, f"its chat template ends turns with {EOT}")
    name = " ".join(
        facts.text(f"general.{key}") or "" for key in ("name", "basename", "finetune")
    ).lower()
    word = re.search(r"(?<![a-z])(instruct|chat|base)(?![a-z])", name)
    if word is not None:
        return Variant(word[1] != "base", f"its name says {word[1]}")
    if facts.id("eos") is not None and facts.id("eos") == facts.index.get(EOT):
        return Variant(True, f"its end of sequence is {EOT}", sure=False)
    if template:
        return Variant(False, "its chat template is a fine-tune's", sure=False)
    return Variant(False, "it has no chat template", sure=False)


# How every text begins that `is_control_text` or `pad_token` knows.
MARKER_STARTS = ("<", "[", "▁<")


def is_control_text(text: str) -> bool:
    """Whether a token's text says that it is a control token.

    Shorter than `<|x|>` is an operator of some language (`<|>`, `<||>`), not a marker.
    """
    return len(text) > 4 and special.looks_special(text)


# embedding_length, feed_forward_length, head_count, head_count_kv of the published models
CODER_WIDTHS: dict[tuple[int, int, int, int], str] = {
    (2048, 5504, 16, 16): "1.3b",
    (4096, 11008, 32, 1): "5.7bmqa",
    (4096, 11008, 32, 32): "6.7b",
    (7168, 19200, 56, 8): "33b",
}


def coder_size(facts: Facts) -> str | None:
    """Which of the published DeepSeek Coder models has these widths, whatever its layers."""
    keys = ("embedding_length", "feed_forward_length", "attention.head_count")
    widths = [facts.number(f"{facts.arch}.{key}") for key in keys]
    # llama.cpp: as many as heads, if not said
    kv = facts.number(f"{facts.arch}.attention.head_count_kv") or widths[2]
    return next((size for known, size in CODER_WIDTHS.items() if [*known] == [*widths, kv]), None)
