"""Random text, weighted to where regex engines and their Unicode tables disagree."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from dsq.tokenizer_port.bytelevel import CHAR_TO_BYTE
from dsq.tokenizer_port.vocabulary import TokenType, Vocabulary


def _chars(*ranges: tuple[int, int]) -> tuple[str, ...]:
    return tuple(chr(code) for first, last in ranges for code in range(first, last + 1))


# White_Space, and what some tables count as such: separators, zero-width ones, U+180E.
WHITE = _chars(
    *((9, 13), (0x1C, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x180E, 0x180E)),
    *((0x2000, 0x200B), (0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x2060), (0x3000, 0x3000)),
    (0xFEFF, 0xFEFF),
)
CONTROL = _chars(
    *((0, 0x1F), (0x7F, 0x9F), (0xAD, 0xAD), (0x200B, 0x200F), (0x202A, 0x202E)),
    *((0x2060, 0x206F), (0xFFF9, 0xFFFD), (0xE0001, 0xE0001), (0xE0020, 0xE007F)),
)
# Where ranges in pre-tokenizers' regexes begin and end: DeepSeek's [一-龥ࠀ-一가-퟿], kana, Hangul,
# CJK extensions, full-width forms; beside the surrogates, and at the end of each plane.
EDGES = tuple(
    chr(code)
    for edge in (
        *(0x7FF, 0x800, 0x1100, 0x11FF, 0x2018, 0x201F, 0x2E80, 0x3000, 0x3002, 0x3040, 0x309F),
        *(0x30A0, 0x30FF, 0x3105, 0x3131, 0x318E, 0x3400, 0x4DBF, 0x4E00, 0x9FA5, 0x9FFF, 0xA960),
        *(0xAC00, 0xD7A3, 0xD7B0, 0xD7FB, 0xD7FF, 0xE000, 0xF8FF, 0xF900, 0xFAFF, 0xFF01, 0xFF5E),
        *(0xFFFF, 0x1FFFF, 0x20000, 0x2A6DF, 0x2EBF0, 0x2EE5D, 0x30000, 0x3134F, 0x323AF, 0x10FFFF),
    )
    for code in (edge - 1, edge, edge + 1)
    if code <= 0x10FFFF and not 0xD800 <= code <= 0xDFFF
)
# Letters, digits and punctuation of Unicode 15.0 to 17.0: some tables have them, some have not.
NEW = _chars(
    *((0x1B4E, 0x1B4F), (0x1B7F, 0x1B7F), (0x1C89, 0x1C8A), (0xA7CB, 0xA7DC), (0x105C0, 0x105F3)),
    *((0x10940, 0x10959), (0x10D40, 0x10D8F), (0x10EC2, 0x10EC7), (0x11380, 0x113E2)),
    *((0x116D0, 0x116E3), (0x11B60, 0x11B67), (0x11BC0, 0x11BE1), (0x11BF0, 0x11BF9)),
    *((0x11DB0, 0x11DE9), (0x11F00, 0x11F59), (0x13439, 0x13455), (0x13460, 0x134A0)),
    *((0x16100, 0x16139), (0x16D40, 0x16D79), (0x16EA0, 0x16ED3), (0x16FF2, 0x16FF6)),
    *((0x18CFF, 0x18CFF), (0x1CCF0, 0x1CCF9), (0x1E4D0, 0x1E4F9), (0x1E5D0, 0x1E5FF)),
    *((0x1E6C0, 0x1E6FF), (0x1FAE9, 0x1FAE9), (0x31350, 0x31360), (0x323B0, 0x323C0)),
)
PRIVATE = _chars((0xE000, 0xE00F), (0xF8F0, 0xF8FF), (0xF0000, 0xF0003), (0x10FFF0, 0x10FFFF))
# Letters that fall together with ASCII when case is ignored, as in (?i:'s), and title case.
CASED = (*"ſKÅİıßẞΣςǅǈǋǲµμΩΩ", *_chars((0x1F88, 0x1F8F), (0xFB00, 0xFB06)))
MARKS = _chars((0x300, 0x315), (0x591, 0x5A0), (0x93C, 0x94D), (0x20D0, 0x20F0), (0xFE00, 0xFE0F))
DIGITS = (*"²³¹½¾Ⅷⅷ①㊿𝟘𝟿〇一", *_chars((0x660, 0x669), (0x966, 0x96F), (0xE50, 0xE59)))
LETTERS = "éüßñøŁжЁшλΩאבحبनमกขアあ中文字语한국ㄱᎠꭰ𝒳𐐷ªʰˇ々ー"
EMOJI = (
    *("🙂", "👍🏽", "👩‍👩‍👧", "🇩🇪", "✈️", "#️⃣", "🏴\U000e0067\U000e0062\U000e007f", "\u200d"),
    *("\u200c", "♪", "→", "≠", "€", "№"),
)
WORDS = (
    *("s", "t", "re", "def", "return", "self", "the", "x1", "i", "foo_bar", "CamelCase", "HTTP"),
    *("0x1F", "1e-9", "3.14", "//", "/*", "->", "=>", "==", "!=", "||", "&&", "'s", "'S", "'re"),
    *("'LL", "n't", "http://a.b/c?d=e", "#include", "{}", "();", '"""', "```", "<!--", "\\n"),
)
ASCII = _chars((0x21, 0x7E))


@cache
def _borders() -> tuple[str, ...]:
    """Both sides of every place where the general category changes."""
    found, last = [], ""
    for code in range(0x110000):
        if 0xD800 <= code <= 0xDFFF:
            continue
        category = unicodedata.category(chr(code))
        if category != last:
            found += [chr(max(code - 1, 0)), chr(code)] if code != 0xE000 else [chr(code)]
        last = category
    return tuple(found)


@dataclass(frozen=True)
class Seams:
    """Text on which a token lies across the border of two characters, and cuts one of them.

    A difference in where text is cut shows at such borders only. DeepSeek Coder has the token
    `<0x89>s`, so a thin space (E2 80 89) and an `s` are two tokens or three.
    """

    white: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    other: tuple[str, ...] = ()


def seams(vocab: Vocabulary) -> Seams:
    """The seams of a vocabulary: its torn tokens, completed by characters of the sets above."""
    raws = [
        bytes(CHAR_TO_BYTE[char] for char in token)
        for token, kind in zip(vocab.tokens, vocab.types, strict=True)
        if kind == TokenType.NORMAL and set(token) <= CHAR_TO_BYTE.keys()
    ]
    torn = [raw for raw in raws if _cut(raw) != (0, len(raw)) and _cut(raw) != (len(raw), 0)]
    sets = (WHITE, NEW, (*EDGES, *CASED, *MARKS, *DIGITS, *LETTERS, *PRIVATE))
    return Seams(*(tuple(_completed(torn, chars)) for chars in sets))


def _cut(raw: bytes) -> tuple[int, int]:
    """Where the whole characters of a token begin and end; none: (its length, 0)."""
    start, end = 0, len(raw)
    while start < len(raw) and 0x80 <= raw[start] < 0xC0:
        start += 1
    for back in range(1, min(4, len(raw) - start) + 1):
        lead = raw[-back]
        if lead >= 0xC0:  # the first byte of a character of 2, 3 or 4
            whole = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            end -= back if back < whole else 0
            break
        if lead < 0x80:
            break
    return (start, end) if start < end else (len(raw), 0)


def _completed(torn: Sequence[bytes], chars: Sequence[str]) -> Iterator[str]:
    heads: dict[bytes, list[str]] = {}
    tails: dict[bytes, list[str]] = {}
    for char in chars:
        raw = char.encode()
        for i in range(1, len(raw)):
            heads.setdefault(raw[:i], []).append(char)
            tails.setdefault(raw[i:], []).append(char)
    for token in torn:
        start, end = _cut(token)
        whole = token[start:end].decode("utf-8", errors="replace")
        if start:
            yield from (char + whole for char in tails.get(token[:start], ()))
        if end < len(token):
            yield from (whole + char for char in heads.get(token[end:], ()))


def random_texts(
    n: int, seed: int = 0, vocab: Vocabulary | None = None, *, most: int = 14
) -> Iterator[str]:
    """`n` texts of 1 to `most` pieces, without lone surrogates; the same for the same seed.

    (And the same Python: which code points are assigned comes from its `unicodedata`.) Of `vocab`,
    the added tokens and the seams occur too.
    """
    rng = random.Random(seed)
    own, added = Seams(), []
    if vocab is not None:
        own = seams(vocab)
        ids = vocab.ids_of_type(TokenType.CONTROL, TokenType.USER_DEFINED)
        added = [vocab.tokens[i] for i in ids]
    sets: list[tuple[float, Sequence[str]]] = [
        *((14, WORDS), (10, ASCII), (10, WHITE), (6, NEW), (6, _borders()), (5, EDGES)),
        *((5, MARKS), (4, CONTROL), (4, DIGITS), (6, LETTERS), (3, CASED), (3, EMOJI)),
        *((3, PRIVATE), (3, added)),
        # A single seam must not be in every other text.
        *((min(len(texts) / 10, 3), texts) for texts in (own.white, own.new, own.other)),
    ]
    sets = [(weight, chars) for weight, chars in sets if chars]
    weights = [weight for weight, _ in sets]

    def piece() -> str:
        kind = rng.random()
        if kind < 0.10:
            return rng.choice((" ", " ", "\t", "\n", "\r\n", "\r")) * _length(rng)
        if kind < 0.16:
            return _any(rng)
        ((_, chars),) = rng.choices(sets, weights)
        text = rng.choice(chars)
        return text * rng.choice((2, 3, 7)) if rng.random() < 0.08 else text

    for _ in range(n):
        yield "".join(piece() for _ in range(rng.randint(1, most)))


def _length(rng: random.Random) -> int:
    return min(int(rng.expovariate(0.4)) + 1, 100)


def _any(rng: random.Random) -> str:
    """Any code point, assigned or not; half of them below U+10000."""
    code = rng.randrange(0x10000 if rng.random() < 0.5 else 0x110000)
    return "\ufffd" if 0xD800 <= code <= 0xDFFF else chr(code)
