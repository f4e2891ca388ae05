"""Engine: what evaluation and generation ask of whatever runs a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from dsq.tokenizer_port.tokenizer import Tokenizer

Floats = npt.NDArray[np.float32]


class Engine(Protocol):
    """A loaded model with one growing sequence of tokens. Not safe for use by several threads.

    Logits are float32. An array that a method returns may lie in the engine's own memory: it is
    valid until the next call, and the caller may overwrite it.
    """

    @property
    def n_ctx(self) -> int:
        """The most tokens the sequence can hold."""
        ...

    @property
    def n_vocab(self) -> int:
        """Logits per position: the model's rows, padding included."""
        ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def n_past(self) -> int:
        """How many tokens the sequence holds."""
        ...

    @property
    def tokens(self) -> tuple[int, ...]:
        """The sequence so far."""
        ...

    def eval(self, tokens: Sequence[int]) -> Floats:
        """Append tokens; the logits (n_vocab,) after the last of them."""
        ...

    def logits(self, tokens: Sequence[int], *, pos0: int = 0, all: bool = True) -> Floats:
        """Cut the sequence to `pos0` tokens, append `tokens`; logits (n, n_vocab) of each.

        With `all=False` only the last row is computed: (1, n_vocab).
        """
        ...

    def window_logits(self, windows: npt.NDArray[np.int32], first: int) -> Floats:
        """Logits of positions first … n-2 of independent windows (n_windows, n).

        The result has n_windows * (n - 1 - first) rows, window after window. Clears the sequence.
        """
        ...

    @property
    def max_windows(self) -> int:
        """How many windows `window_logits` takes at once."""
        ...

    def truncate(self, n_tokens: int) -> None:
        """Forget all but the first `n_tokens` of the sequence."""
        ...

    def close(self) -> None:
        """Free the model. Closing twice is allowed."""
        ...


def prefill(engine: Engine, tokens: Sequence[int], *, reuse: bool = True) -> Floats:
    """Make `tokens` the engine's sequence; the logits (n_vocab,) after the last.

    With `reuse` the longest common beginning with the present sequence is kept, so a chat's next
    turn evaluates only what is new. Without it every run computes in the same order, and repeats
    bit for bit.
    """
    kept = 0
    if reuse:
        have = engine.tokens
        limit = min(len(have), len(tokens) - 1)  # the last token always runs: its logits are asked
        while kept < limit and have[kept] == tokens[kept]:
            kept += 1
    row: Floats = engine.logits(tokens[kept:], pos0=kept, all=False)[0]
    return row
