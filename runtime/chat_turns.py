"""A chat template as its turns: what stands around each message. For formats that cannot run Jinja.

The template is rendered on conversations of marker words, cut at them, and the parts are proved on
other conversations before they are used: a template that does more than surround its messages is
refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsq.errors import InputError, UnsupportedError
from dsq.tokenizer_port.chat import render_chat
from dsq.tokenizer_port.tokenizer import Tokenizer

Message = Mapping[str, str]

_S, _U, _A, _V = "dsqsystemword", "dsquserword", "dsqanswerword", "dsqseconduserword"


@dataclass(frozen=True)
class Turns:
    """Texts around messages. `system` is None for a template that refuses system messages.

    `default` begins a conversation without a system message; `opening` asks for the answer.
    """

    default: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    opening: str
    trims: bool  # the template strips messages, which these texts cannot

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation, ready for an answer, without BOS."""
        around = {"system": self.system, "user": self.user, "assistant": self.assistant}
        text = "" if any(m["role"] == "system" for m in messages) else self.default
        for message in messages:
            before, after = around[message["role"]] or ("", "")
            text += before + message["content"] + after
        return text + self.opening


def chat_turns(tokenizer: Tokenizer) -> Turns:
    """Raises UnsupportedError for a template that is no row of turns, InputError without one."""
    template = _Template(tokenizer)
    user, answer, second = _said("user", _U), _said("assistant", _A), _said("user", _V)
    first, between, again, end = template.cut([user, answer, second], _U, _A, _V)
    closing = template.cut([user, answer], _A, ask=False)[1]  # after an answer
    after_user = template.cut([user], _U, ask=False)[1]
    before_user = _rest(again, closing)
    turns = Turns(
        default=_front(first, before_user),
        system=template.system(before_user),
        user=(before_user, after_user),
        assistant=(_rest(between, after_user), closing),
        opening=_rest(end, after_user),
        trims=False,
    )
    system = [_said("system", "Be brief.")] if turns.system else []
    for proof in (
        [_said("user", "Why?")],
        [*system, _said("user", "Why?")],
        [_said("user", "a"), _said("assistant", "b"), _said("user", "c")],
        [*system, *[_said(role, f"{i}\n{i}") for i in range(3) for role in ("user", "assistant")]],
    ):
        if turns.render(proof) != template.text(proof):
            raise _unsupported("it treats some messages in a way of its own")
    spaced = [_said("user", "\n  a b \n"), _said("assistant", " c\n"), _said("user", " d ")]
    trims = turns.render(spaced) != template.text(spaced)
    return Turns(**{**vars(turns), "trims": trims})


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _unsupported(why: str) -> UnsupportedError:
    return UnsupportedError(
        f"chat_template: {why}, so it cannot be written as turns; write the other format's "
        "template by hand"
    )


def _rest(text: str, start: str) -> str:
    if not text.startswith(start):
        raise _unsupported("what follows a message depends on the next one")
    return text[len(start) :]


def _front(text: str, end: str) -> str:
    if not text.endswith(end):
        raise _unsupported("the first user message begins in a way of its own")
    return text[: len(text) - len(end)]


class _Template:
    """The model's own template; BOS is left out where the runtime adds it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        vocab = tokenizer.vocab
        self._bos = vocab.tokens[vocab.bos] if vocab.add_bos and vocab.bos is not None else ""

    def text(self, messages: Sequence[Message], *, ask: bool = True) -> str:
        settings: dict[str, Any] = {"add_generation_prompt": ask}
        return render_chat(self._tokenizer, messages, settings).removeprefix(self._bos)

    def cut(self, messages: Sequence[Message], *words: str, ask: bool = True) -> list[str]:
        """The texts before, between and after the words."""
        rest, parts = self.text(messages, ask=ask), []
        for word in words:
            before, found, rest = rest.partition(word)
            if not found or word in rest:
                raise _unsupported("it does not write each message once, as it is")
            parts.append(before)
        return [*parts, rest]

    def system(self, before_user: str) -> tuple[str, str] | None:
        try:
            before, after, _ = self.cut([_said("system", _S), _said("user", _U)], _S, _U)
        except UnsupportedError:
            raise
        except InputError:  # raise_exception: this model takes none
            return None
        return before, _front(after, before_user)
