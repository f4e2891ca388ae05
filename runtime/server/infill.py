"""Fill in the middle within a context: what is dropped of the file, and the prompt's tokens.

What stands nearest to the hole stays, cut at a line's border. Other files stand inside the prefix,
before the file: DeepSeek Coder was trained on joined files with a hole in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsq.errors import InputError
from dsq.runtime.line_cut import STRIDES, keep_end, keep_start
from dsq.runtime.repo.context import LEAST_PART, Context, heading
from dsq.tokenizer_port.tokenizer import Tokenizer

SUFFIX_SHARE = 4  # one part in four of the room is the suffix's, where both are too long
OTHERS_SHARE = 4  # and one part in four the other files', if there are any

Planned = Callable[[int], Context]  # how many tokens a repository may take → what it gives


@dataclass(frozen=True)
class Infill:
    """A prompt, and how many tokens of what the client sent are not in it."""

    ids: tuple[int, ...]
    dropped_prefix_tokens: int = 0
    dropped_suffix_tokens: int = 0
    dropped_extra_files: int = 0
    cut_extra_files: int = 0
    context: Context | None = None

    def report(self) -> dict[str, Any]:
        """The response's `dsq` field."""
        found: dict[str, Any] = {
            "dropped_prefix_tokens": self.dropped_prefix_tokens,
            "dropped_suffix_tokens": self.dropped_suffix_tokens,
            "dropped_extra_files": self.dropped_extra_files,
            "cut_extra_files": self.cut_extra_files,
        }
        return found if self.context is None else {**found, "repo": self.context.report()}


@dataclass(frozen=True)
class Extra:
    """Another file, or a piece of one, that the completion may look at."""

    name: str
    text: str


@dataclass(frozen=True)
class Head:
    """What stands before the file: `ids`, and what had no room."""

    ids: tuple[int, ...] = ()
    dropped_extra_files: int = 0
    cut_extra_files: int = 0
    context: Context | None = None


@dataclass(frozen=True)
class Surroundings:
    """The file's own path, files that the client sent, and a repository that the server knows."""

    path: str | None = None
    extra: Sequence[Extra] = ()
    repo: Planned | None = field(default=None, compare=False)

    def head(self, tokenizer: Tokenizer, room: int) -> Head:
        """At most `room` tokens. What the client sent comes first: it has just been looked at."""
        own = tokenizer.encode(heading(self.path), add_bos=False) if self.path else []
        own = own if len(own) <= room else []
        room -= len(own)
        sent, n_dropped, n_cut = _extra_files(tokenizer, self.extra, room)
        context = None if self.repo is None else self.repo(max(0, room - len(sent)))
        before = context.ids if context is not None else ()
        return Head((*before, *sent, *own), n_dropped, n_cut, context)


ALONE = Surroundings()


def infill(
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    *,
    n_ctx: int,
    n_predict: int,
    around: Surroundings = ALONE,
    parse_special: bool = False,
) -> Infill:
    """The prompt for what belongs between `prefix` and `suffix`, in `n_ctx - n_predict` tokens.

    An answer that wants more than half the context leaves half of it to the file; one without a
    limit (-1) has a quarter. Raises InputError for a model without fill-in-the-middle tokens.
    """
    empty = tokenizer.fim("", "")  # refuses a model without the tokens; the markers and BOS
    room = prompt_room(n_ctx, n_predict) - len(empty)
    if room < 1:
        raise InputError(f"a context of {n_ctx} has no room for a file; serve with a larger -c")
    before, after = (
        tokenizer.encode(text, add_bos=False, parse_special=parse_special)
        for text in (prefix, suffix)
    )
    left = max(room - len(before) - len(after), room // OTHERS_SHARE)
    head = around.head(tokenizer, in_strides(room, left))
    n_before, n_after = _shares(len(before), len(after), room - len(head.ids))
    kept_before = keep_end(tokenizer, prefix, before, n_before, parse_special)
    kept_after = keep_start(tokenizer, suffix, after, n_after, parse_special)
    v = tokenizer.vocab
    body = [v.fim_prefix, *head.ids, *kept_before, v.fim_suffix, *kept_after, v.fim_middle]
    bos = [v.bos] if v.bos is not None and empty[0] == v.bos else []
    return Infill(
        tuple(token for token in (*bos, *body) if token is not None),
        len(before) - len(kept_before),
        len(after) - len(kept_after),
        head.dropped_extra_files,
        head.cut_extra_files,
        head.context,
    )


def prompt_room(n_ctx: int, n_predict: int) -> int:
    """Tokens of a context that the prompt may have, when `n_predict` (-1: any number) follow."""
    wanted = n_ctx // 4 if n_predict < 0 else max(1, n_predict)
    return max(n_ctx - wanted, n_ctx // 2)


def in_strides(room: int, left: int) -> int:
    """What is `left` of the room, rounded down to eighths of it: the next keystroke, or the next
    turn, then finds the same files in the cache."""
    stride = max(1, room // STRIDES)
    return max(0, left) // stride * stride


def with_files(
    tokenizer: Tokenizer,
    prefix: str,
    *,
    n_ctx: int,
    n_predict: int,
    around: Surroundings,
    parse_special: bool = False,
) -> tuple[tuple[int, ...], Mapping[str, Any]]:
    """A prompt to go on with, after other files; and the response's `dsq` field.

    Nothing of `prefix` is dropped: what is too long for the context is for the caller to refuse.
    """
    ids = tokenizer.encode(prefix, parse_special=parse_special)
    bos = tokenizer.vocab.bos
    start = 1 if bos is not None and ids[:1] == [bos] else 0
    room = prompt_room(n_ctx, n_predict) - start
    head = around.head(tokenizer, in_strides(room, room + start - len(ids)))
    found = Infill(
        (*ids[:start], *head.ids, *ids[start:]),
        dropped_extra_files=head.dropped_extra_files,
        cut_extra_files=head.cut_extra_files,
        context=head.context,
    )
    return found.ids, found.report()


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


def _extra_files(
    tokenizer: Tokenizer, extra: Sequence[Extra], room: int
) -> tuple[list[int], int, int]:
    """Tokens of the files, how many had no room, and how many were cut at a line's end.

    The last ones stay, as in llama.cpp: its editor plugins send the newest last.
    """
    kept: list[list[int]] = []
    n_cut = 0
    for file in reversed(extra):
        text = (heading(file.name) if file.name.strip() else "") + file.text.rstrip() + "\n\n"
        ids = tokenizer.encode(text, add_bos=False)
        if len(ids) > room:
            ids = keep_start(tokenizer, text, ids, room) if room >= LEAST_PART else []
            n_cut += bool(ids)
            if ids:
                kept.append(ids)
            break
        kept.append(ids)
        room -= len(ids)
    return [i for ids in reversed(kept) for i in ids], len(extra) - len(kept), n_cut
