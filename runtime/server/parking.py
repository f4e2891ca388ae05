"""Idle sequences out of the way of long prompts.

llama.cpp's attention goes over every used cell of the cache, also those of other sequences, and
reads the mask to find that they are not to be seen: beside 1,000 such cells a prompt takes a tenth
longer on a model of 135m. So what idle slots hold is copied out while a long prompt is read, and
back when a request wants it: a small part of what evaluating it anew takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from dsq.runtime.server.llama_batch import LlamaBatch
from dsq.runtime.server.scheduler import Plan, Remove
from dsq.runtime.server.sequences import MOST_PARKED

_LONG = 128  # tokens of a prompt in one batch


class Parking:
    """Keeps sequences that are not in the model's cache for now."""

    def __init__(self, model: LlamaBatch, most_bytes: int = MOST_PARKED) -> None:
        self._model, self._most_bytes = model, most_bytes
        self._parked: dict[int, npt.NDArray[np.uint8]] = {}

    def fetch(self, plan: Plan) -> None:
        """Put back what the plan is about to use, before its cache changes are made."""
        for change in plan.cache:
            if isinstance(change, Remove):
                if change.start == 0:
                    self._parked.pop(change.slot, None)
                else:
                    self._restore(change.slot)
            else:
                self._restore(change.source)
        for rows in plan.rows:
            self._restore(rows.slot)

    def make_way(self, plan: Plan, idle: Iterable[tuple[int, int]]) -> None:
        """Park the idle (slot, tokens) if the plan has much of a prompt."""
        if sum(len(rows.tokens) for rows in plan.rows if rows.is_prompt) < _LONG:
            return
        used = sum(len(data) for data in self._parked.values())
        for slot, _ in idle:
            if slot not in self._parked:
                size = self._model.size_of(slot)
                if used + size <= self._most_bytes:
                    self._parked[slot] = self._model.save(slot)
                    self._model.remove(slot, 0)
                    used += size

    def clear(self) -> None:
        """The model's cache was cleared."""
        self._parked.clear()

    @property
    def slots(self) -> Sequence[int]:
        return tuple(self._parked)

    def _restore(self, slot: int) -> None:
        data = self._parked.pop(slot, None)
        if data is not None:
            self._model.restore(slot, data)
