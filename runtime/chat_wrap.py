"""An answer's prose broken between words, while it comes. Code and tables keep their lines."""

from __future__ import annotations

import unicodedata

LONGEST_WORD = 40  # characters; a longer one does not wait for its end


class Wrapper:
    """`push` pieces, print what it returns; `finish` gives what was held back.

    Only spaces between words become line breaks, outside ``` fences and lines that begin with `|`.
    A word is held until it ends; characters that are two columns wide, as in Chinese, are words.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._column = 0
        self._gap, self._word = "", ""
        self._line = ""  # its beginning, which says what kind it is
        self._fenced = False

    def push(self, piece: str) -> str:
        return "".join(map(self._character, piece))

    def finish(self) -> str:
        return self._flush()

    def _character(self, char: str) -> str:
        if char == "\n":
            out = self._flush() + char
            self._fenced ^= self._line.startswith("```")
            self._column, self._line = 0, ""
            return out
        if char != " " and len(self._line) < 3:
            self._line += char
        if self._fenced or self._line[:1] in ("|", "`") or not self._width:
            self._column += columns(char)
            return self._flush() + char
        if char == " ":
            out = self._flush() if self._word else ""
            self._gap += char
            return out
        wide = columns(char) > 1
        out = self._flush() if wide or len(self._word) >= LONGEST_WORD else ""
        self._word += char
        return out + (self._flush() if wide else "")

    def _flush(self) -> str:
        gap, word = self._gap, self._word
        self._gap = self._word = ""
        n = columns(word)
        if word and self._column and gap and self._column + len(gap) + n > self._width:
            self._column = n
            return "\n" + word
        self._column += len(gap) + n
        return gap + word


def columns(text: str) -> int:
    """How wide a terminal shows it."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )
