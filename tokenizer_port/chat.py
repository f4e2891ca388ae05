"""Encode a conversation so that only the template's own markers are control tokens.

A user who types `<|EOT|>` must not end the turn. Before the template is rendered, a character of
every control token in the messages is replaced by a private-use character that occurs nowhere
else; the control tokens found afterwards are the template's, and the text between them is put back
and encoded as ordinary text. One character stands for one, so trimming, lengths and comparisons in
the template work as before.

The limits: a template that looks for a control token inside a message (DeepSeek's does not) does
not find it, which is the safe way round. A template that rewrites messages (`upper`, `replace`,
`split` and `join`) can make a control token of text that was none: it is then the template's own.
Roles, and words that templates compare with (`type`, settings), may hold letters, digits, `_` and
`-` only, as many templates build their markers from them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dsq.errors import InputError
from dsq.tokenizer_port.json_file import brief

if TYPE_CHECKING:
    from dsq.tokenizer_port.tokenizer import Tokenizer

_ROLE = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PRIVATE_USE = range(0xE000, 0xF900)
# Keys whose values templates compare with words; those words may be part of a control token.
_COMPARED_KEYS = ("role", "type")


class ControlTexts:
    """The texts of the control tokens, and how a piece of text could become one."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids = {text: token for text, token in ids.items() if text}
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._heads = {text[:n] for text in self.ids for n in range(1, len(text))}
        self._tails = {text[n:] for text in self.ids for n in range(1, len(text))}
        self._longest = max(map(len, self.ids), default=0)

    def whole(self, text: str) -> Iterator[int]:
        """Where control tokens begin in a text."""
        match = self.pattern.search(text)
        while match:
            yield match.start()
            match = self.pattern.search(text, match.start() + 1)

    def begun(self, text: str) -> Iterator[int]:
        """Where the end of a text may be the beginning of a control token."""
        for n in range(1, min(self._longest, len(text) + 1)):
            if text[-n:] in self._heads:
                yield len(text) - n

    def continued(self, text: str) -> bool:
        """Whether the beginning of a text may be the rest of a control token."""
        if any(text[:n] in self._tails for n in range(1, min(self._longest, len(text) + 1))):
            return True
        return 0 < len(text) < self._longest and any(text in token for token in self.ids)


def render_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> str:
    """The conversation as the template writes it, control tokens as their texts."""
    from dsq.tokenizer_port.chat_template import render

    vocab = tokenizer.vocab
    if vocab.chat_template is None:
        raise InputError(
            "this model has no chat template; complete text instead, or take the instruct model"
        )
    settings = {"add_generation_prompt": True, **variables}
    return render(
        vocab.chat_template,
        messages,
        bos_token="" if vocab.bos is None else vocab.tokens[vocab.bos],
        eos_token="" if vocab.eos is None else vocab.tokens[vocab.eos],
        **settings,
    )


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    *,
    parse_special: bool = False,
) -> list[int]:
    """Token ids of the conversation, BOS only where the template writes one.

    `parse_special`: the texts of control tokens become the tokens in messages, too.
    """
    _check(messages)
    try:
        if parse_special:
            text = render_chat(tokenizer, messages, variables)
            return tokenizer.encode(text, add_bos=False, parse_special=True)
        return _masked(tokenizer, messages, variables)
    except RecursionError:
        raise InputError("messages: are nested too deeply; flatten them") from None


def _check(messages: Any) -> None:
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise InputError(f"messages: are {brief(messages)}; a list of objects is needed")
    for message in messages:
        if not isinstance(message, Mapping):
            raise InputError(
                f"messages: one is {brief(message)}; an object is needed, with role and content"
            )
        role = message.get("role")
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise InputError(
                f"messages: role is {brief(role)}; a role is one word of letters, digits, _ and "
                "-, such as system, user, assistant"
            )


def _masked(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> list[int]:
    control = tokenizer.control_texts
    template = tokenizer.vocab.chat_template or ""
    mask = _Mask(control, "".join([template, *_strings([list(messages), dict(variables)])]))
    text = render_chat(
        tokenizer,
        [mask.value(message) for message in messages],
        {name: mask.value(value, "type") for name, value in variables.items()},
    )
    ids: list[int] = []
    at, swallow = 0, False
    for match in control.pattern.finditer(text):
        # An added token's entry in tokenizer.json can say that it swallows white space beside it.
        flags = tokenizer.added_flags(match[0])
        piece = text[at : match.start()]
        piece = piece.lstrip() if swallow else piece
        piece = piece.rstrip() if flags.get("lstrip") else piece
        ids += tokenizer.encode(mask.undo(piece), add_bos=False)
        ids.append(control.ids[match[0]])
        at, swallow = match.end(), bool(flags.get("rstrip"))
    piece = text[at:].lstrip() if swallow else text[at:]
    return ids + tokenizer.encode(mask.undo(piece), add_bos=False)


class _Mask:
    """Private-use characters in the place of characters that could make a control token."""

    def __init__(self, control: ControlTexts, text: str) -> None:
        self._control = control
        used = {*text, *(char for token in control.ids for char in token)}
        self._free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
        self._stand_ins: dict[str, str] = {}

    def undo(self, text: str) -> str:
        return text.translate({ord(new): old for old, new in self._stand_ins.items()})

    def value(self, value: Any, key: str = "") -> Any:
        """The same value with every string in it masked, dict keys too; `key` is where it is."""
        if isinstance(value, str):
            return self._text(value, compared=key in _COMPARED_KEYS)
        if isinstance(value, Mapping):
            return {
                self._text(k, compared=True) if isinstance(k, str) else k: self.value(item, k)
                for k, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.value(item, key) for item in value]
        return value

    def _text(self, text: str, *, compared: bool) -> str:
        # Templates trim: what matters is where the text begins and ends without white space.
        start = len(text) - len(text.lstrip())
        core = text.strip()
        places = {start + i for i in (*self._control.whole(core), *self._control.begun(core))}
        if not (compared and _ROLE.fullmatch(core)) and self._control.continued(core):
            places.add(start)
        if not places:
            return text
        return "".join(self._stand_in(c) if i in places else c for i, c in enumerate(text))

    def _stand_in(self, char: str) -> str:
        if char not in self._stand_ins:
            stand_in = next(self._free, None)
            if stand_in is None:
                raise InputError(
                    "messages: use every private-use character of Unicode (U+E000 to U+F8FF), "
                    "leaving none to tell text from control tokens; remove some"
                )
            self._stand_ins[char] = stand_in
        return self._stand_ins[char]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)
