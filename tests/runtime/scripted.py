"""An engine that says what the test wants, and remembers what it was asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from dsq.errors import InputError
from dsq.tokenizer_port.tokenizer import Tokenizer

Floats = npt.NDArray[np.float32]


class ScriptedEngine:
    """The likeliest token after the prompt is `script[0]`, after that `script[1]`, and so on."""

    max_windows = 1

    def __init__(self, tokenizer: Tokenizer, script: Iterable[int], n_ctx: int = 100) -> None:
        self.tokenizer = tokenizer
        self.n_ctx = n_ctx
        self.n_vocab = len(tokenizer)
        self.script = iter(script)
        self.held: list[int] = []
        self.evaluated: list[int] = []  # how many tokens each call evaluated

    @property
    def n_past(self) -> int:
        return len(self.held)

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(self.held)

    def eval(self, tokens: Sequence[int]) -> Floats:
        return self.logits(tokens, pos0=len(self.held), all=False)[0]

    def logits(self, tokens: Sequence[int], *, pos0: int = 0, all: bool = True) -> Floats:
        if pos0 + len(tokens) > self.n_ctx:
            raise InputError("too long")
        self.held[pos0:] = list(tokens)
        self.evaluated.append(len(tokens))
        row = np.zeros((1, self.n_vocab), np.float32)
        row[0, next(self.script)] = 10
        return row

    def window_logits(self, windows: npt.NDArray[np.int32], first: int) -> Floats:
        raise NotImplementedError

    def truncate(self, n_tokens: int) -> None:
        del self.held[n_tokens:]

    def close(self) -> None:
        pass
