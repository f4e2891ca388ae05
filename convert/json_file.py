"""JSON files of a checkpoint, read strictly: a key given twice has no meaning to trust."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dsq.errors import InputError

# JSON can spell half of a UTF-16 pair; such text could not even be printed
_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_object(text: str, where: str) -> dict[str, Any]:
    """The JSON object `text`; `where` names it in errors: a file, or a part of one."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise InputError(f"{where}: the key {shown(key)} is given twice; remove one")
            if not key.isascii() and _SURROGATE.search(key):
                raise InputError(f"{where}: the key {shown(key)} is no text (half a character)")
            found[key] = value
        return found

    def constant(name: str) -> None:
        raise InputError(f"{where}: {name} is no JSON; give a number")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON: line {error.lineno}: {error.msg}") from None
    # Nested a thousand deep, or an integer of 5000 digits.
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: holds a JSON {type(value).__name__}; expected an object")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read the file: {error.strerror or error}") from error
    return parse_object(text, str(path))


def shown(name: str) -> str:
    """A name from a file for a message: quoted, escaped, and short."""
    return repr(name if len(name) <= 80 else name[:77] + "...")
