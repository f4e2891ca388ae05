"""Stop strings in text that comes piece by piece: never half printed."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Holds back the end of the text while it may yet become a stop string.

    The stop string that ends first wins, and of two that end together the longer one, so that the
    result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """What can be given out now; once a stop string is found, what stood before it."""
        if not self._stops:
            return piece
        if self.found is not None:
            return ""
        text = self._held + piece
        ends = [(at + len(s), at, s) for s in self._stops if (at := text.find(s)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            self._held = ""
            return text[:at]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What is still held, at the end of the generation."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`, which is not whole in it."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
