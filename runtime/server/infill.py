"""Fill in the middle within a context: what is dropped of the file, and the prompt's tokens.

What stands nearest to the hole stays. The cut is at a line's border (inside a line only where one
line alone is too long), and moves in strides, so that the next keystroke finds the same beginning
of the prompt in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsq.errors import InputError
from dsq.tokenizer_port.tokenizer import Tokenizer

SUFFIX_SHARE = 4  # one part in four of the room is the suffix's, where both are too long
STRIDES = 8  # a cut that must move drops a further eighth of the room


@dataclass(frozen=True)
class Infill:
    """A prompt, and how many tokens of what the client sent are not in it."""

    ids: tuple[int, ...]
    dropped_prefix_tokens: int = 0
    dropped_suffix_tokens: int = 0
    dropped_extra_files: int = 0

    def report(self) -> dict[str, int]:
        """The response's `dsq` field."""
        return {
            "dropped_prefix_tokens": self.dropped_prefix_tokens,
            "dropped_suffix_tokens": self.dropped_suffix_tokens,
            "dropped_extra_files": self.dropped_extra_files,
        }


@dataclass(frozen=True)
class Extra:
    """Another file that the completion may look at."""

    name: str
    text: str


def infill(
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    *,
    n_ctx: int,
    n_predict: int,
    extra: Sequence[Extra] = (),
    parse_special: bool = False,
) -> Infill:
    """The prompt for what belongs between `prefix` and `suffix`, in `n_ctx - n_predict` tokens.

    An answer that wants more than half the context leaves half of it to the file; one without a
    limit (-1) has a quarter. `extra` files
    stand before the file, as comments name them, the last ones dropped first. Raises InputError
    for a model without fill-in-the-middle tokens.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_bos=False, parse_special=parse_special)

    empty = tokenizer.fim("", "")  # refuses a model without the tokens; the markers and BOS
    wanted = n_ctx // 4 if n_predict < 0 else max(1, n_predict)
    room = max(n_ctx - wanted, n_ctx // 2) - len(empty)
    if room < 1:
        raise InputError(f"a context of {n_ctx} has no room for a file; serve with a larger -c")
    before, after = encode(prefix), encode(suffix)
    n_before, n_after = _shares(len(before), len(after), room)
    kept_before = keep_end(tokenizer, prefix, before, n_before, parse_special)
    kept_after = keep_start(tokenizer, suffix, after, n_after, parse_special)
    v = tokenizer.vocab
    body = [v.fim_prefix, *kept_before, v.fim_suffix, *kept_after, v.fim_middle]
    left = room - len(kept_before) - len(kept_after)
    head, n_dropped = _extra_files(tokenizer, extra, left)
    bos = [v.bos] if v.bos is not None and empty[0] == v.bos else []
    ids = tuple(token for token in (*bos, *head, *body) if token is not None)
    return Infill(ids, len(before) - len(kept_before), len(after) - len(kept_after), n_dropped)


def _shares(n_before: int, n_after: int, room: int) -> tuple[int, int]:
    """How many tokens each side may have: what one does not need is the other's."""
    if n_before + n_after <= room:
        return n_before, n_after
    part = room // SUFFIX_SHARE
    if n_after <= part:
        return room - n_after, n_after
    if n_before <= room - part:
        return n_before, room - n_before
    return room - part, part


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


def _extra_files(tokenizer: Tokenizer, extra: Sequence[Extra], room: int) -> tuple[list[int], int]:
    """Tokens of as many files as fit, whole, and how many did not."""
    ids: list[int] = []
    for i, file in enumerate(extra):
        name = " ".join(file.name.split())
        text = f"# {name}\n{file.text.rstrip()}\n\n" if name else f"{file.text.rstrip()}\n\n"
        found = tokenizer.encode(text, add_bos=False)
        if len(ids) + len(found) > room:
            return ids, len(extra) - i
        ids += found
    return ids, 0
