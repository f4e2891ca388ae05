"""Choosing the next token from logits, with llama.cpp's own samplers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsq.errors import InputError
from dsq.runtime.engine import Floats

_MAX_SEED = 0xFFFFFFFE  # llama.cpp takes the next one for "draw a seed"
PENALTY_WINDOW = 64  # how many of the last tokens the repeat penalty looks at


@dataclass(frozen=True)
class SamplerSettings:
    """llama.cpp's order: repeat penalty, top_k, top_p, min_p, temperature. Temperature 0: greedy.

    `top_k` 0, `top_p` 1, `min_p` 0 and `repeat_penalty` 1 switch their step off. `seed` None
    draws one.
    """

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int | None = None
    repeat_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temp", 0.0, math.inf),
            ("top_k", 0, math.inf),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if not (low <= value <= high and math.isfinite(value)):  # also refuses nan
                bounds = "0 or more" if high == math.inf else f"between {low:g} and {high:g}"
                raise InputError(f"{name} is {value}; it must be {bounds}")
        if not self.repeat_penalty > 0:
            raise InputError(
                f"repeat_penalty is {self.repeat_penalty}; it must be above 0 (1 switches it off)"
            )
        if self.seed is not None and not 0 <= self.seed <= _MAX_SEED:
            raise InputError(f"seed is {self.seed}; it must be from 0 to {_MAX_SEED}")


GREEDY = SamplerSettings(temp=0.0)


class Sampler:
    """One run's sampler: it remembers tokens (for the penalty) and its random state."""

    def __init__(self, settings: SamplerSettings, n_vocab: int) -> None:
        self.settings = settings
        self._chain: Any = None
        if settings.temp == 0 and settings.repeat_penalty == 1:
            return  # plain arg-max needs no chain
        import llama_cpp

        from dsq.runtime.llama_sampler import Candidates, make_chain

        self._lib, self._candidates = llama_cpp, Candidates
        self._ids = np.arange(n_vocab, dtype=np.int32)
        self._chain = make_chain(
            n_vocab,
            temperature=settings.temp,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            repeat_penalty=settings.repeat_penalty,
            last_n=PENALTY_WINDOW,
            seed=settings.seed,
        )

    def accept(self, tokens: Iterable[int]) -> None:
        """Let the penalty know of tokens that were not sampled here: the prompt's."""
        if self._chain is not None:
            for token in tokens:
                self._lib.llama_sampler_accept(self._chain, token)

    def sample(self, logits: Floats) -> int:
        """The next token; logits (n_vocab,) are left as they are."""
        if self._chain is None:
            return int(logits.argmax())
        candidates = self._candidates(self._ids, logits)
        candidates.apply(self._chain)
        token: int = candidates.selected
        self._lib.llama_sampler_accept(self._chain, token)
        return token

    def close(self) -> None:
        if self._chain is not None:
            self._lib.llama_sampler_free(self._chain)  # frees the steps as well
            self._chain = None
