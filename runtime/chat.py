"""A conversation: turns in the model's own template, each evaluating only what is new."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress

from dsq.runtime.engine import Engine
from dsq.runtime.generate import Completion, Generation, generate
from dsq.runtime.sampling import SamplerSettings


class ChatSession:
    """`send` a message, iterate over the answer. `messages` is the conversation so far.

    An answer that is interrupted (KeyboardInterrupt, or the loop over it is left) stays in the
    conversation as far as it came, and the session goes on. A message that cannot be answered at
    all, for example because the conversation no longer fits the context, is taken out again.

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
        self._sampler = sampler or SamplerSettings()
        self._stop_strings = stop_strings
        self._parse_special = parse_special
        self._stop_ids = engine.tokenizer.stop_ids("chat")
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self.last: Completion | None = None
        self._active: Generator[str, None, None] | None = None

    def send(self, text: str) -> Generator[str, None, None]:
        """The answer's text, piece by piece. Raises InputError when it cannot fit the context."""
        if self._active is not None:
            self._active.close()  # an abandoned answer is kept before the next turn begins
        self.messages.append({"role": "user", "content": text})
        try:
            generation = generate(
                self._engine,
                self._engine.tokenizer.chat(
                    self.messages, add_generation_prompt=True, parse_special=self._parse_special
                ),
                max_tokens=self._max_tokens,
                stop_ids=self._stop_ids,
                stop_strings=self._stop_strings,
                sampler=self._sampler,
                reuse=True,
            )
        except BaseException:
            self.messages.pop()
            raise
        self.last = None
        self._active = self._answer(generation)
        with suppress(StopIteration):
            next(self._active)  # to its first line: from here on, closing it keeps the turn whole
        return self._active

    def _answer(self, generation: Generation) -> Generator[str, None, None]:
        try:
            yield ""
            yield from generation
            self.last = generation.result
        finally:
            if generation.text or generation.stop_reason is not None:
                self.messages.append({"role": "assistant", "content": generation.text})
            else:
                self.messages.pop()

    def reset(self) -> None:
        """Forget the conversation, all but the system message."""
        if self._active is not None:
            self._active.close()
            self._active = None
        self.messages = [m for m in self.messages if m["role"] == "system"]
        self.last = None
