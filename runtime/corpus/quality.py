"""Which files are worth calibrating on: DeepSeek Coder's rules, which are StarCoder's.

arXiv 2401.14196, section 2.1; arXiv 2305.06161, section 3.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser

from dsq.runtime.repo.syntax import syntax_fault

MOST_AVERAGE_LINE = 100  # characters
MOST_LINE = 1000  # characters
LEAST_ALPHABETIC = 0.25  # share of characters
LEAST_VISIBLE_SHARE = 0.2  # of an HTML file
LEAST_VISIBLE = 100  # characters
DATA_LENGTH = (50, 5000)  # characters of a JSON or YAML file

_HAN = re.compile(r"[㐀-䶿一-鿿豈-﫿]")
_KANA = re.compile(r"[぀-ヿ]")
_LETTER = re.compile(r"[^\W\d_]")
_WORD = re.compile(r"[A-Za-z']+")
_ENGLISH = frozenset("the of and to a in is it for that this with be are or as on by an if".split())


def fault(language: str, text: str) -> str | None:
    """Why a source file is left out; None when it is good."""
    if "<?xml version=" in text[:100] and language != "XSLT":
        return "XML"
    lines = text.splitlines()
    if max(map(len, lines), default=0) > MOST_LINE:
        return f"line over {MOST_LINE} characters"
    if len(text) > MOST_AVERAGE_LINE * max(1, len(lines)):
        return f"average line over {MOST_AVERAGE_LINE} characters"
    if sum(map(str.isalpha, text)) < LEAST_ALPHABETIC * len(text):
        return f"under {LEAST_ALPHABETIC:.0%} alphabetic"
    if language == "HTML" and not _is_readable(text):
        return "HTML with little visible text"
    if language in ("JSON", "YAML") and not DATA_LENGTH[0] <= len(text) <= DATA_LENGTH[1]:
        return f"{language} not of {DATA_LENGTH[0]} to {DATA_LENGTH[1]} characters"
    if syntax_fault(language, text):
        return "syntax error"
    return None


def tongue(text: str) -> str | None:
    """`english` or `chinese` for a text that is mostly one of the two; else None."""
    letters = len(_LETTER.findall(text))
    han = len(_HAN.findall(text))
    if letters < 100:
        return None
    # A Chinese manual page has much English in it: names, options, examples.
    if han > 0.2 * letters:
        return "chinese" if len(_KANA.findall(text)) < 0.05 * han else None
    words = _WORD.findall(text.lower())
    common = sum(word in _ENGLISH for word in words)
    if han < 0.01 * letters and common > 0.1 * len(words):
        return "english"
    return None


def _is_readable(html: str) -> bool:
    parser = _Visible()
    parser.feed(html)
    parser.close()
    visible = len(" ".join("".join(parser.parts).split()))
    return visible >= LEAST_VISIBLE and visible >= LEAST_VISIBLE_SHARE * len(html)


class _Visible(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._hidden = max(0, self._hidden - 1)

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)
