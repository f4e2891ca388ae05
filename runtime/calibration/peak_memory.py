"""The most memory this process held: sampled, because the kernel's own peak counts mapped files."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")
_SECONDS = 0.05


class PeakMemory:
    """A context; `n_bytes` is the peak of heap and stacks (RssAnon) within it, None off Linux.

    Pages of mapped weight files are left out: the kernel drops them when it needs the room.
    """

    def __init__(self) -> None:
        self.n_bytes: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_SECONDS):
            self._sample()
        self._sample()

    def _sample(self) -> None:
        try:
            found = re.search(r"^RssAnon:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
        except OSError:
            return
        if found:
            self.n_bytes = max(self.n_bytes or 0, int(found[1]) << 10)
