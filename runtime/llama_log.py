"""llama.cpp's log: silent by default, its last errors kept for messages.

llama.cpp has one log for the whole process, so this module holds one callback for as long as the
process lives: a callback that Python frees would crash at the next line.
"""

from __future__ import annotations

import ctypes
import sys
from collections import deque

import llama_cpp

_CONTINUED, _ERROR = 5, 4  # enum ggml_log_level; debug 1, info 2, warn 3

_verbose = False
_last_level = 0
_errors: deque[str] = deque(maxlen=8)


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _callback(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    global _last_level
    line = text.decode("utf-8", "replace")
    if level == _CONTINUED:
        level = _last_level
    _last_level = level
    if level == _ERROR and line.strip():
        _errors.append(line.strip())
    if _verbose:
        sys.stderr.write(line)


def install(verbose: bool) -> None:
    """Take over llama.cpp's log; forget earlier errors."""
    global _verbose
    _verbose = verbose
    _errors.clear()
    llama_cpp.llama_log_set(_callback, ctypes.c_void_p(0))


def last_errors() -> str:
    """The last error lines, joined by `; `, for one-line messages."""
    return "; ".join(_errors)
