"""Runs of dsq in a process of their own, which kills itself (SIGKILL) at a chosen call."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

_CHILD = """
import importlib, json, os, signal, sys

code, where, left, values = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
module, path = where.split(":")
*owners, name = path.split(".")
owner = importlib.import_module(module)
for part in owners:
    owner = getattr(owner, part)
original = getattr(owner, name)

def dying(*args, **named):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **named)

setattr(owner, name, dying)
exec(code, values)
"""


def die(code: str, where: str, nth: int, **values: Any) -> None:
    """Run `code` with the names `values` (JSON) until the `nth` call of `where` begins.

    `where` is like "package.module:Class.method". Fails when the code came to its end.
    """
    values = {key: str(v) if isinstance(v, Path) else v for key, v in values.items()}
    command = [sys.executable, "-c", _CHILD, code, where, str(nth), json.dumps(values)]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == -9, f"{where} was not called {nth} times\n{done.stderr}"
