"""A calibration corpus: documents of tokens, packed in windows."""

from __future__ import annotations

import bisect
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dsq.errors import InputError


@dataclass(frozen=True)
class Corpus:
    """Documents in a seeded order, each ending with the end-of-text token if there is one.

    `whole`: for each document, whether a window should hold all of it (a fill-in-the-middle
    sample). `record`: what went in, JSON-serialisable.
    """

    documents: list[list[int]]
    whole: list[bool]
    record: dict[str, Any]

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.documents))

    def windows(
        self, n_ctx: int, n_tokens: int | None = None, bos: int | None = None
    ) -> npt.NDArray[np.int32]:
        """(windows, n_ctx) token ids, each row one window, from about `n_tokens` of the corpus.

        With `bos` every window begins with it. A whole document stands in one window, the others
        fill the rest and go on from window to window; what fills no window at the end is left out.
        Raises InputError when not one window is full.
        """
        if n_ctx < 4:
            raise InputError(f"n_ctx is {n_ctx}; windows need at least 4 tokens")
        room = n_ctx - (bos is not None)
        rows = _pack(self.documents, self.whole, room)
        # Those with whole documents come out first; any number of windows must be a fair sample.
        random.Random(0).shuffle(rows)
        rows = rows if n_tokens is None else rows[: n_tokens // n_ctx]
        if not rows:
            have = self.n_tokens if n_tokens is None else min(n_tokens, self.n_tokens)
            raise InputError(
                f"the corpus has {have} tokens, but one window needs {n_ctx}; "
                "name more sources, ask for more tokens, or take a smaller n_ctx"
            )
        windows = np.array(rows, np.int32)  # (windows, room)
        return windows if bos is None else np.insert(windows, 0, bos, axis=1)


def _pack(documents: list[list[int]], whole: list[bool], room: int) -> list[list[int]]:
    """Rows of `room` tokens: whole documents by best fit, longest first, then the others."""
    pairs = list(zip(documents, whole, strict=True))
    fitting = [ids for ids, is_whole in pairs if is_whole and len(ids) <= room]
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (space left, row), sorted
    for ids in sorted(fitting, key=len, reverse=True):
        i = bisect.bisect_left(spaces, (len(ids), -1))
        if i < len(spaces):
            space, row = spaces.pop(i)
            rows[row] += ids
        else:
            space, row = room, len(rows)
            rows.append(list(ids))
        bisect.insort(spaces, (space - len(ids), row))
    # The fullest rows first: should there be too little to fill all, the emptiest remain.
    rows = [rows[row] for _, row in spaces]
    others = [ids for ids, is_whole in pairs if not is_whole or len(ids) > room]
    stream = [token for ids in others for token in ids]
    position = 0
    for row_ids in rows:
        take = room - len(row_ids)
        row_ids += stream[position : position + take]
        position += take
    full = [ids for ids in rows if len(ids) == room]
    # Rows that could not be filled are cut to size as the other documents are.
    stream = stream[position:] + [token for ids in rows if len(ids) < room for token in ids]
    n = len(stream) // room
    return full + [stream[i * room : (i + 1) * room] for i in range(n)]
