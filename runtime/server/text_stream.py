"""Text from tokens as they come: whole characters, and never the beginning of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsq.runtime.server.backend import Finish, TokenLogprobs
    from dsq.tokenizer_port.tokenizer import Tokenizer


class StopFilter:
    """Holds back the end of the text while it may yet become a stop string.

    The stop string that ends first wins, and of two that end together the longer one, so that the
    result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """What can be given out now; once a stop string is found, what stood before it."""
        if not self._stops:
            return piece
        if self.found is not None:
            return ""
        text = self._held + piece
        ends = [(at + len(s), at, s) for s in self._stops if (at := text.find(s)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            self._held = ""
            return text[:at]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What is still held, at the end of the generation."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`, which is not whole in it."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


@dataclass(frozen=True)
class TextToken:
    """A token whose text has been given out. `offset` is where it begins, in characters."""

    id: int
    offset: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class Piece:
    text: str
    tokens: tuple[TextToken, ...]


class TextStream:
    """One answer: push its tokens, get its text and the tokens that this text is made of.

    A token comes out with its last character; one that a stop string cuts off entirely, never.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._decoder = tokenizer.stream_decoder()
        self._filter = StopFilter(stops)
        self._decoded = 0  # characters that the tokens so far have made
        self._emitted = 0
        self._waiting: list[tuple[int, TextToken]] = []  # where a token's text ends, the token
        self.n_tokens = 0

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text; push nothing more then."""
        return self._filter.found

    def push(self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None = None) -> Piece:
        text = ""
        for i, token in enumerate(ids):
            piece = self._decoder.push(token)
            entry = TextToken(token, self._decoded, logprobs[i] if logprobs else None)
            self._decoded += len(piece)
            self._waiting.append((self._decoded, entry))
            self.n_tokens += 1
            text += self._filter.push(piece)
            if self._filter.found is not None:
                break
        return self._out(text)

    def finish(self, how: Finish) -> Piece:
        """The held rest. Half a character that `length` cut off is no text; a model's own is."""
        text = self._filter.push(self._decoder.finish()) if how == "stop" else ""
        if self._filter.found is None:
            text += self._filter.rest()
        return self._out(text, last=True)

    def _out(self, text: str, *, last: bool = False) -> Piece:
        self._emitted += len(text)
        if self._filter.found is not None:
            ready = [token for _, token in self._waiting if token.offset < self._emitted]
            self._waiting.clear()
        elif last:
            ready = [token for _, token in self._waiting]
            self._waiting.clear()
        else:
            n = sum(end <= self._emitted for end, _ in self._waiting)
            ready = [token for _, token in self._waiting[:n]]
            del self._waiting[:n]
        return Piece(text, tuple(ready))
