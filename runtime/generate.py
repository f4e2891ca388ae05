"""Generation: tokens one after another, as text that is whole at every moment."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

from dsq.errors import InputError
from dsq.runtime.engine import Engine, prefill
from dsq.runtime.sampling import PENALTY_WINDOW, Sampler, SamplerSettings
from dsq.runtime.stop_filter import StopFilter

StopReason = Literal["eos", "length", "stop", "context"]


@dataclass(frozen=True)
class Completion:
    """What was generated. `text` ends before a stop string; `tokens` has no stop token."""

    text: str
    tokens: tuple[int, ...]
    stop_reason: StopReason
    tokens_per_second: float  # the prompt's evaluation is not counted
    prompt_tokens: int


class Generation:
    """Iterate over it for the text as it comes; afterwards `result` says how it ended.

    `text` and `tokens` hold what there is so far, also after an interruption.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        stop_ids: AbstractSet[int],
        stop_strings: Sequence[str] = (),
        sampler: SamplerSettings,
        reuse: bool = False,
    ) -> None:
        if not prompt:
            raise InputError("the prompt is empty; give at least one character")
        if max_tokens < 1:
            raise InputError(f"max_tokens is {max_tokens}; it must be 1 or more")
        if len(prompt) >= engine.n_ctx:
            raise InputError(
                f"the prompt has {len(prompt)} tokens, but a context of {engine.n_ctx} holds at "
                f"most {engine.n_ctx - 1} and one to generate; raise -c or shorten the prompt"
            )
        if any(not s for s in stop_strings):
            raise InputError("a stop string is empty; every text contains it: remove it")
        self.text = ""
        self.tokens: list[int] = []
        self.stop_reason: StopReason | None = None
        self._engine = engine
        self._prompt = list(prompt)
        self._max_tokens = max_tokens
        self._stop_ids = stop_ids
        self._stop_strings = tuple(stop_strings)
        self._settings = sampler
        self._reuse = reuse
        self._seconds = 0.0
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    @property
    def result(self) -> Completion:
        """Runs to the end if it has not been iterated yet."""
        for _ in self._pieces:
            pass
        if self.stop_reason is None:
            raise RuntimeError("the generation was interrupted; see text and tokens")
        rate = len(self.tokens) / self._seconds if self._seconds else 0.0
        return Completion(self.text, tuple(self.tokens), self.stop_reason, rate, len(self._prompt))

    def _run(self) -> Iterator[str]:
        engine, sampler = self._engine, Sampler(self._settings, self._engine.n_vocab)
        decoder = engine.tokenizer.stream_decoder()
        held = StopFilter(self._stop_strings)
        try:
            logits = prefill(engine, self._prompt, reuse=self._reuse)
            sampler.accept(self._prompt[-PENALTY_WINDOW:])
            while True:
                before = time.perf_counter()
                token = sampler.sample(logits)
                if token in self._stop_ids:
                    self.stop_reason = "eos"
                    yield from self._emit(held.push(decoder.finish()) + held.rest())
                    return
                self.tokens.append(token)
                piece = held.push(decoder.push(token))
                self._seconds += time.perf_counter() - before
                yield from self._emit(piece)
                if held.found is not None:
                    self.stop_reason = "stop"
                    return
                if len(self.tokens) >= self._max_tokens or engine.n_past >= engine.n_ctx:
                    full = len(self.tokens) < self._max_tokens
                    self.stop_reason = "context" if full else "length"
                    # Not decoder.finish(): half a character cut by the limit is no text.
                    yield from self._emit(held.rest())
                    return
                before = time.perf_counter()
                logits = engine.eval([token])
                self._seconds += time.perf_counter() - before
        finally:
            sampler.close()

    def _emit(self, piece: str) -> Iterator[str]:
        if piece:
            self.text += piece
            yield piece


def generate(
    engine: Engine,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    stop_ids: AbstractSet[int],
    stop_strings: Sequence[str] = (),
    sampler: SamplerSettings,
    reuse: bool = False,
) -> Generation:
    """Generate after `prompt_ids` until a stop token, a stop string, max_tokens or a full context.

    `reuse` keeps what the engine has already evaluated of the prompt. Raises InputError, before
    anything is evaluated, for a prompt that does not fit: nothing is ever cut off silently.
    """
    return Generation(
        engine,
        prompt_ids,
        max_tokens=max_tokens,
        stop_ids=stop_ids,
        stop_strings=stop_strings,
        sampler=sampler,
        reuse=reuse,
    )
