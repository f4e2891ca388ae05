"""A conversation: turns in the model's own template, each evaluating only what is new."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import suppress

from dsq.errors import InputError
from dsq.runtime.chat_context import joined, with_files
from dsq.runtime.engine import Engine
from dsq.runtime.generate import Completion, Generation, generate
from dsq.runtime.sampling import SamplerSettings

Messages = list[dict[str, str]]

FULL, ROOMY = 8, 4  # an eighth of the context left is too little; turns go until a quarter is


class ChatSession:
    """`send` a message, iterate over the answer. `messages` is the conversation so far.

    An answer that is interrupted (KeyboardInterrupt, or the loop over it is left) stays in the
    conversation as far as it came, and the session goes on. A message that cannot be answered at
    all, because it does not fit the context even alone, is taken out again. Before that the oldest
    turns are dropped; `n_dropped` counts those of the last `send`.

    `files` stands before the first message, whichever that is, and `attached` goes with the next.
    Control tokens' texts in messages are text, unless `parse_special`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        system: str | None = None,
        max_tokens: int | None = None,
        sampler: SamplerSettings | None = None,
        stop_strings: tuple[str, ...] = (),
        parse_special: bool = False,
    ) -> None:
        self._engine = engine
        self._max_tokens = max_tokens or engine.n_ctx
        self.sampler = sampler or SamplerSettings()
        self._stop_strings = stop_strings
        self._parse_special = parse_special
        self._stop_ids = engine.tokenizer.stop_ids("chat")
        self.messages: Messages = []
        self.files = ""
        self.attached: list[str] = []
        self.n_dropped = 0
        if system is not None:
            self.system = system
        self.last: Completion | None = None
        self._active: Generator[str, None, None] | None = None

    @property
    def n_ctx(self) -> int:
        return self._engine.n_ctx

    @property
    def n_used(self) -> int:
        """Tokens of the context that the conversation takes now."""
        return self._engine.n_past if self.turns() else 0

    @property
    def system(self) -> str | None:
        first = self.messages[:1]
        return first[0]["content"] if first and first[0]["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        self.messages = [m for m in self.messages if m["role"] != "system"]
        if text is not None:
            self.messages.insert(0, {"role": "system", "content": text})

    def turns(self) -> list[Messages]:
        """The conversation without the system message: a user's message and what answers it."""
        found: list[Messages] = []
        for message in self.messages:
            if message["role"] == "user":
                found.append([message])
            elif found:
                found[-1].append(message)
        return found

    def send(self, text: str) -> Generator[str, None, None]:
        """The answer's text, piece by piece. Raises InputError when it cannot fit the context."""
        self._settle()
        before, attached = list(self.messages), list(self.attached)
        for files in reversed(attached):
            text = joined(files, text)
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self._fitting()
            generation = generate(
                self._engine,
                ids,
                max_tokens=self._max_tokens,
                stop_ids=self._stop_ids,
                stop_strings=self._stop_strings,
                sampler=self.sampler,
                reuse=True,
            )
        except BaseException:
            self.messages = before
            raise
        self.attached = []
        self.last = None
        self._active = self._answer(generation, attached)
        with suppress(StopIteration):
            next(self._active)  # to its first line: from here on, closing it keeps the turn whole
        return self._active

    def regenerate(self) -> Generator[str, None, None]:
        """Another answer to the last message. Raises InputError when there is none."""
        text = self.undo()
        if text is None:
            raise InputError("there is no message yet to answer again")
        return self.send(text)

    def undo(self) -> str | None:
        """Take the last turn back; the message that it began with, None without one."""
        self._settle()
        turns = self.turns()
        if not turns:
            return None
        del self.messages[-len(turns[-1]) :]
        self.last = None
        return turns[-1][0]["content"]

    def reset(self) -> None:
        """Forget the conversation, all but the system message and the repository's files."""
        self.replace([m for m in self.messages if m["role"] == "system"])

    def replace(self, messages: Sequence[dict[str, str]]) -> None:
        """Go on with another conversation."""
        self._settle()
        self.messages = [dict(message) for message in messages]
        self.attached = []
        self.last = None

    def _settle(self) -> None:
        """An abandoned answer is kept, as far as it came, before the next thing happens."""
        if self._active is not None:
            self._active.close()
            self._active = None

    def _ids(self) -> list[int]:
        return self._engine.tokenizer.chat(
            with_files(self.messages, self.files),
            add_generation_prompt=True,
            parse_special=self._parse_special,
        )

    def _fitting(self) -> list[int]:
        """The prompt, without the oldest turns where the context is nearly full.

        Several go at once, so that not every message from then on evaluates the whole anew.
        """
        self.n_dropped = 0
        n_ctx = self._engine.n_ctx
        ids, whole = self._ids(), self.messages
        wanted = min(self._max_tokens, n_ctx // FULL)
        while len(ids) + wanted > n_ctx and len(turns := self.turns()) > 1:
            wanted = min(self._max_tokens, n_ctx // ROOMY)
            start = len(self.messages) - sum(map(len, turns))
            self.messages = self.messages[:start] + self.messages[start + len(turns[0]) :]
            self.n_dropped += 1
            ids = self._ids()
        if len(ids) >= n_ctx:  # the message alone: the conversation stays as it was
            self.messages, self.n_dropped = whole, 0
        return ids

    def _answer(self, generation: Generation, attached: list[str]) -> Generator[str, None, None]:
        try:
            yield ""
            yield from generation
            self.last = generation.result
        finally:
            if generation.text or generation.stop_reason is not None:
                self.messages.append({"role": "assistant", "content": generation.text})
            else:  # the message is taken back, and its files wait for the next
                self.messages.pop()
                self.attached = attached + self.attached
