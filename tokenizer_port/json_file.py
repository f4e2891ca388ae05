"""JSON files, read strictly: a key given twice has no meaning to trust."""

from __future__ import annotations

import json
import re
import reprlib
from pathlib import Path
from typing import Any, TypeVar

from dsq.errors import InputError

T = TypeVar("T")

# JSON can spell half of a UTF-16 pair; such text could not even be printed
_SURROGATE = re.compile("[\ud800-\udfff]")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")

MAX_DEPTH = 100  # no file of a model comes near it, and recursion over the value stays safe

_AGAIN = "download or convert the model again"
_NAMES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a whole number",
    bool: "true or false",
}

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 80


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
    if _is_deep(value):
        raise InputError(f"{where}: is nested more than {MAX_DEPTH} deep; {_AGAIN}")
    if _SURROGATE_ESCAPE.search(text) and _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise InputError(f"{where}: a string in it is no text (half a character); {_AGAIN}")
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


def brief(value: Any) -> str:
    """Any value from a file for a message: on one line, and short."""
    return " ".join(_BRIEF.repr(value).split())


def expect(value: Any, kind: type[T], what: str, remedy: str = _AGAIN) -> T:
    """`value` if it is of `kind` (a bool is no int); `what` names it: file and key."""
    if isinstance(value, kind) and (kind is not int or not isinstance(value, bool)):
        return value
    if value is None:
        raise InputError(f"{what} is missing; {_NAMES[kind]} is needed: {remedy}")
    raise InputError(f"{what} is {brief(value)}; {_NAMES[kind]} is needed: {remedy}")


def optional(value: Any, kind: type[T], what: str, remedy: str = _AGAIN) -> T | None:
    """As `expect`, but None (a key left out, or null) is allowed."""
    return None if value is None else expect(value, kind, what, remedy)


def _is_deep(value: dict[str, Any]) -> bool:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        children = (c for node in level for c in (node.values() if type(node) is dict else node))
        level = [child for child in children if isinstance(child, (dict, list))]
        if not level:
            return False
    return True
