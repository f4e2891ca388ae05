"""A process killed between any two operations on the file system, played in this one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_OPERATIONS = ("open", "mkdir", "rename", "replace", "unlink", "rmdir", "fsync")


class Killed(BaseException):
    """Stands for SIGKILL: nobody catches it, and no cleaning up changes the disk any more."""


@contextmanager
def killed_at(n: int) -> Iterator[None]:
    """Die at the n-th operation (from 0): it is not done, nor is any after it.

    What was open is closed, as the kernel does it, so that locks are given back.
    """
    left, opened = n, set()
    functions = {name: getattr(os, name) for name in (*_OPERATIONS, "close")}

    def dying(name: str) -> Any:
        def operation(*args: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            result = functions[name](*args, **named)
            if name == "open":
                opened.add(result)
            return result

        return operation

    def close(descriptor: int) -> None:
        opened.discard(descriptor)
        functions["close"](descriptor)

    with pytest.MonkeyPatch.context() as patch:
        for name in _OPERATIONS:
            patch.setattr(os, name, dying(name))
        patch.setattr(os, "close", close)
        try:
            yield
        finally:
            for descriptor in opened:
                functions["close"](descriptor)
