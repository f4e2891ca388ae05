"""Text from tokens as they come: whole characters, and never the beginning of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsq.runtime.stop_filter import StopFilter

if TYPE_CHECKING:
    from dsq.runtime.server.backend import Finish, TokenLogprobs
    from dsq.tokenizer_port.tokenizer import Tokenizer


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
