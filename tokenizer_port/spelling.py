"""How a family's published tokenizer.json is written, where its chain leaves a choice.

None of it changes a token; it makes a rebuilt file equal to the published one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spelling:
    """The default is what the tokenizers library writes today."""

    no_normalizer: dict[str, Any] | None = None  # what stands there if nothing is normalized
    newlines_as_they_are: bool = False  # CR and LF themselves in a regex, not escaped
    says_ignore_merges: bool = True  # `model.ignore_merges`, which files before 2024 lack
    # Whether added tokens stand in `model.vocab` too. They must wherever ids are missing or base
    # tokens follow: the library ignores the ids in `added_tokens` and numbers on from `vocab`.
    added_in_vocab: bool = True
    added_normalized: bool = False
    not_special: frozenset[str] = field(default=frozenset())  # control tokens all the same

    def step(self, step: dict[str, Any]) -> dict[str, Any]:
        """A step of the pre-tokenizer as the file spells it."""
        if not self.newlines_as_they_are or step["type"] != "Split":
            return step
        regex = step["pattern"]["Regex"].replace(r"\r", "\r").replace(r"\n", "\n")
        return {**step, "pattern": {"Regex": regex}}


_DEEPSEEK_CODER = Spelling(
    no_normalizer={"type": "Sequence", "normalizers": []},
    newlines_as_they_are=True,
    says_ignore_merges=False,
    added_in_vocab=False,
    added_normalized=True,
    not_special=frozenset(
        (
            *("<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"),
            *("<pad>", "<|User|>", "<|Assistant|>", "<|EOT|>"),
        )
    ),
)

_SPELLINGS = {
    "deepseek-coder": _DEEPSEEK_CODER,
    "llama-bpe": Spelling(added_in_vocab=False),  # Llama 3
}


def spelling_of(pre: str) -> Spelling:
    """By llama.cpp's name for the pre-tokenizer."""
    return _SPELLINGS.get(pre, Spelling())
