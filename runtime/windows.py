"""llama-perplexity's protocol: which tokens are seen, and which are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsq.errors import InputError

VERSION = 1  # part of every cached reference's key: raise it when anything here changes


@dataclass(frozen=True)
class Windows:
    """Independent windows of text; positions first … n_ctx - 2 each predict the next token."""

    ids: npt.NDArray[np.int32]  # (n, n_ctx)
    targets: npt.NDArray[np.int32]  # (n, n_ctx - 1 - first)
    first: int

    @property
    def scored(self) -> int:
        """Scored tokens a window."""
        return int(self.targets.shape[1])

    def __len__(self) -> int:
        return len(self.ids)


def join(texts: Sequence[str]) -> str:
    """One text. As `llama-perplexity -f` does, the newline that ends a file is dropped."""
    return "\n".join(text.removesuffix("\n") for text in texts)


def cut(ids: Sequence[int], n_ctx: int, *, bos: int | None, chunks: int | None = None) -> Windows:
    """Cut the tokens of a whole text in windows of n_ctx; the rest that fills none is dropped.

    With `bos` each window's first token is replaced by it. The first half of a window is context
    only. `chunks` keeps that many windows. Raises InputError when not one window is full.
    """
    if n_ctx < 4:
        raise InputError(f"n_ctx is {n_ctx}; windows need at least 4 tokens")
    if chunks is not None and chunks < 1:
        raise InputError(f"chunks is {chunks}; give 1 or more, or leave it out for all of them")
    n = len(ids) // n_ctx
    if n == 0:
        raise InputError(
            f"the text has {len(ids)} tokens, but one window needs {n_ctx}; "
            "give a longer text or a smaller n_ctx"
        )
    n = min(n, chunks or n)
    windows = np.asarray(ids[: n * n_ctx], np.int32).reshape(n, n_ctx)
    first = n_ctx // 2
    targets = windows[:, first + 1 :].copy()
    if bos is not None:
        windows[:, 0] = bos
    return Windows(windows, targets, first)
