"""A text that is too long for its room, cut at a line's border.

Inside a line only where one line alone is too long. The cut of a text's end moves in strides, so
that the next keystroke finds the same beginning of the prompt in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

from dsq.tokenizer_port.tokenizer import Tokenizer

STRIDES = 8  # a cut that must move drops a further eighth of the room


def keep_end(
    tokenizer: Tokenizer, text: str, ids: Sequence[int], room: int, parse_special: bool = False
) -> list[int]:
    """The tokens of the end of `text`, from a line's beginning; `ids` are those of the whole."""
    if len(ids) <= room:
        return list(ids)
    if room < 1:
        return []
    stride = max(1, room // STRIDES)
    drop = -(-(len(ids) - room) // stride) * stride
    data = text.encode()
    last_line = data.rfind(b"\n", 0, len(data) - data.endswith(b"\n")) + 1
    at = sum(len(tokenizer.token_bytes(i)) for i in ids[:drop])
    while True:
        border = data.find(b"\n", max(0, at - 1)) + 1
        if not 0 < border < len(data) or border > last_line:
            break
        kept = _encoded(tokenizer, data[border:], parse_special)
        if len(kept) <= room:
            return kept
        at = border + max(1, len(kept) - room)  # each token too many is a byte or more
    return _whole_characters(tokenizer, list(ids[drop:]), at_start=True)


def keep_start(
    tokenizer: Tokenizer, text: str, ids: Sequence[int], room: int, parse_special: bool = False
) -> list[int]:
    """The tokens of the beginning of `text`, up to a line's end."""
    if len(ids) <= room:
        return list(ids)
    if room < 1:
        return []
    data = text.encode()
    at = sum(len(tokenizer.token_bytes(i)) for i in ids[:room])
    while True:
        border = data.rfind(b"\n", 0, at) + 1
        if border < 1:
            break
        kept = _encoded(tokenizer, data[:border], parse_special)
        if len(kept) <= room:
            return kept
        at = border - max(1, len(kept) - room)
    return _whole_characters(tokenizer, list(ids[:room]), at_start=False)


def _encoded(tokenizer: Tokenizer, data: bytes, parse_special: bool) -> list[int]:
    return tokenizer.encode(data.decode(), add_bos=False, parse_special=parse_special)


def _whole_characters(tokenizer: Tokenizer, ids: list[int], *, at_start: bool) -> list[int]:
    """Without the tokens at the cut that hold part of a character only."""
    while ids:
        data = tokenizer.token_bytes(ids[0] if at_start else ids[-1])
        broken = (
            data[:1] and 0x80 <= data[0] < 0xC0 if at_start else not _ends_whole(ids, tokenizer)
        )
        if not broken:
            break
        del ids[0 if at_start else -1]
    return ids


def _ends_whole(ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    tail = b"".join(tokenizer.token_bytes(i) for i in ids[-4:])
    for n in range(1, min(4, len(tail)) + 1):
        lead = tail[-n]
        if lead < 0x80:
            return True
        if lead >= 0xC0:
            return n == (2 if lead < 0xE0 else 3 if lead < 0xF0 else 4)
    return False
