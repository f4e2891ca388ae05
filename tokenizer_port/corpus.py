"""Texts on which tokenizers are known to differ. All written for this purpose.

Hugging Face and llama.cpp agree on them for every known family, but for `DECOMPOSED` where a family
normalizes, so that `dsq verify` can ask for equality. Where they differ is for `fuzz` to find.
"""

from __future__ import annotations

from dsq.tokenizer_port.corpus_prose import (
    CONTROLS,
    DECOMPOSED,
    LETTERS,
    MARKS,
    NUMBERS,
    PROSE,
    SEPARATORS,
    SIGNS,
    SPACES,
)
from dsq.tokenizer_port.corpus_source import SOURCE
from dsq.tokenizer_port.vocabulary import TokenType, Vocabulary

_ALONE = 64  # added tokens that have a text of their own
_TOGETHER = 32


def corpus(vocab: Vocabulary) -> list[str]:
    """The built-in texts, and every added token of the vocabulary inside text."""
    added = [vocab.tokens[i] for i in vocab.ids_of_type(TokenType.CONTROL, TokenType.USER_DEFINED)]
    alone, others = added[:_ALONE], added[_ALONE:]
    parts = [others[i : i + _TOGETHER] for i in range(0, len(others), _TOGETHER)]
    return [
        *(*SOURCE.values(), *PROSE, *SIGNS, *NUMBERS, *MARKS, DECOMPOSED),
        *(*SPACES, *SEPARATORS, *CONTROLS, *LETTERS),
        *alone,
        *(_inside(token) for token in alone),
        *("".join(map(_inside, part)) for part in parts),
    ]


def _inside(token: str) -> str:
    return f"a {token} b{token}{token}\n"
