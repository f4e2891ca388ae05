"""The smallest text that still shows a fault, and the code points that it takes."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

# From the simplest on; each stands for a class that pre-tokenizers know.
PLAIN = "a 1.=\n"

_KINDS = {"Cc": "control", "Co": "private use", "Cs": "surrogate"}


@dataclass(frozen=True)
class CodePoint:
    code: int
    name: str  # Unicode's, or what kind it is in <>
    category: str  # of two letters; "Cn" also where this Python's Unicode is older than the letter

    def __str__(self) -> str:
        return f"U+{self.code:04X} {self.name} ({self.category})"

    def to_json(self) -> dict[str, str]:
        return {"code": f"U+{self.code:04X}", "name": self.name, "category": self.category}


def code_point(char: str) -> CodePoint:
    category = unicodedata.category(char)
    kind = _KINDS.get(category, f"not in Unicode {unicodedata.unidata_version}")
    return CodePoint(ord(char), unicodedata.name(char, f"<{kind}>"), category)


def shrink(text: str, fails: Callable[[str], bool], *, budget: int = 1 << 25) -> str:
    """A smallest form of `text`, which `fails`: it fails too, and nothing can be taken from it.

    That is: it would no longer fail with one character less, nor with one replaced by a simpler
    one of `PLAIN`. Delta debugging (Zeller and Hildebrandt, 2002): chunks from half the text down
    to one character are left out as long as it fails. `budget` bounds the characters tried, and
    with them the time; when it is spent, the smallest text so far is returned.
    """
    left = budget

    def still(candidate: str) -> bool:
        nonlocal left
        left -= len(candidate) + 1
        return left >= 0 and fails(candidate)

    before = None
    while text != before:
        before = text
        text = _simplified(_without_chunks(text, still), still)
    return text


def _without_chunks(text: str, fails: Callable[[str], bool]) -> str:
    size = max(len(text) // 2, 1)
    while True:
        at, length = 0, len(text)
        while at < len(text):
            candidate = text[:at] + text[at + size :]
            if fails(candidate):
                text = candidate
            else:
                at += size
        if size > 1:
            size //= 2
        elif len(text) == length:
            return text


def _simplified(text: str, fails: Callable[[str], bool]) -> str:
    for i, char in enumerate(text):
        # The sum of ranks falls with each replacement, so this comes to an end.
        rank = PLAIN.find(char)
        for plain in PLAIN if rank < 0 else PLAIN[:rank]:
            candidate = text[:i] + plain + text[i + 1 :]
            if fails(candidate):
                text = candidate
                break
    return text


def blame(smallest: str) -> tuple[CodePoint, ...]:
    """The code points of a text from `shrink` that make it fail, each once, in order.

    Those that are neither printable ASCII nor a letter if there are any, else those outside ASCII,
    else all: what stands beside an odd one shows the fault, but does not cause it.
    """
    chars = list(dict.fromkeys(smallest))
    unusual = [char for char in chars if not " " <= char <= "~"]
    odd = [char for char in unusual if not unicodedata.category(char).startswith("L")]
    return tuple(map(code_point, odd or unusual or chars))
