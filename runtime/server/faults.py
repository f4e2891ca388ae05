"""What is wrong with a body, in words: where, what stands there, what is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from fastapi.exceptions import RequestValidationError

from dsq.runtime.server import bodies
from dsq.runtime.server.problems import Problem

SEND_JSON = "send a JSON object"

_KINDS = {
    "string_type": "a string",
    "list_type": "a list",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "finite_number": "a finite number",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "it must be at least {}"),
    "greater_than": ("gt", "it must be more than {}"),
    "less_than_equal": ("le", "it must be at most {}"),
    "less_than": ("lt", "it must be less than {}"),
}
_SIZES = {
    "too_long": "has {actual_length} entries; at most {max_length} are taken in one request",
    "too_short": "has {actual_length} entries; at least {min_length} must be there",
    "string_too_long": "has more than {max_length} characters; shorten it",
    "string_too_short": "has fewer than {min_length} characters; write more or leave it out",
}


def what_is_invalid(error: RequestValidationError) -> Problem:
    """The fault that says most. Where a field takes several types, that of the type which what was
    sent comes nearest to."""
    faults = error.errors()
    if not faults:
        return _bad(f"the body is no JSON object; {SEND_JSON}")
    first = faults[0]
    if first["type"] == "json_invalid":
        what = (first.get("ctx") or {}).get("error", "it cannot be read")
        return _bad(f"the body is no JSON: {what}, at character {first['loc'][-1]}")
    if first["loc"][0] != "body":  # a query's or a path's
        name = str(first["loc"][-1])[:40]
        return _bad(f"{name}: {_in_words([first])}", name)
    where = _place(first["loc"])
    if not where:
        what = "is empty" if first["type"] == "missing" else f"is {_shown(first.get('input'))}"
        return _bad(f"the body {what}; {SEND_JSON}")
    same_field = [fault for fault in faults if _place(fault["loc"])[:1] == where[:1]]
    nearest = _nearest(same_field)
    where = _place(nearest[0]["loc"])
    path = ".".join(map(str, where[:5]))
    return _bad(f"{path}: {_in_words(nearest)}", path)


def what_cannot_be_read(cause: BaseException | None) -> Problem:
    """Of a body that is no JSON in a way of its own; `cause` is what the reader said."""
    if isinstance(cause, RecursionError):
        return _bad(
            "the body nests its lists and objects deeper than can be read, which is about 900 "
            "levels; flatten it"
        )
    if isinstance(cause, UnicodeDecodeError):
        return _bad(f"the body is no UTF-8, from byte {cause.start} on; send it in UTF-8")
    if isinstance(cause, ValueError) and "digits" in str(cause):
        return _bad("the body has a number of more than 4,300 digits; shorten it")
    return _bad(f"the body cannot be read; {SEND_JSON}")


def _bad(message: str, param: str | None = None) -> Problem:
    return Problem(400, message, "invalid_request", param=param)


@cache
def _field_names() -> frozenset[str]:
    kinds = [bodies.Body]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return frozenset(
        name for kind in kinds for key, f in kind.model_fields.items() for name in (f.alias or key,)
    )


def _place(loc: Sequence[Any]) -> tuple[str | int, ...]:
    """Fields and list positions; no names of types, and no keys of the client's own."""
    known = _field_names()
    return tuple(part for part in loc[1:] if isinstance(part, int) or part in known)


def _branch(loc: Sequence[Any]) -> str:
    """Which of a field's types a fault is of; empty where it takes one only."""
    known = _field_names()
    return next((p for p in loc[1:] if isinstance(p, str) and p not in known), "")


def _nearest(faults: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The faults of one place that say what is wrong there."""
    branches: dict[str, list[Mapping[str, Any]]] = {}
    for fault in faults:
        branches.setdefault(_branch(fault["loc"]), []).append(fault)

    def right_type(found: Sequence[Mapping[str, Any]]) -> tuple[bool, Any]:
        first = found[0]
        place = _place(first["loc"])
        return first["type"] not in _KINDS, (len(place), *(p for p in place if isinstance(p, int)))

    best = max(right_type(found) for found in branches.values())
    chosen = [f for found in branches.values() if right_type(found) == best for f in found]
    place = _place(chosen[0]["loc"])
    return [fault for fault in chosen if _place(fault["loc"]) == place]


def _in_words(faults: Sequence[Mapping[str, Any]]) -> str:
    fault = faults[0]
    kind, value, context = fault["type"], fault.get("input"), fault.get("ctx") or {}
    if kind == "missing":
        return "is missing"
    if kind in _BOUNDS:
        name, rule = _BOUNDS[kind]
        return f"is {_shown(value)}; {rule.format(context[name])}"
    if kind in _SIZES:
        return _SIZES[kind].format(**context)
    if kind in _KINDS:
        wanted = list(dict.fromkeys(_KINDS[f["type"]] for f in faults if f["type"] in _KINDS))
        return f"is {_shown(value)}; {' or '.join(wanted)} is needed"
    if kind == "literal_error":
        return f"is {_shown(value, text=True)}; it is {context.get('expected')}"
    return str(fault["msg"])


def _shown(value: Any, *, text: bool = False) -> str:
    """A number as it is, anything else by its kind; a text only where it is a name."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        shown = str(value) if abs(value) < 1e30 or isinstance(value, float) else "a huge number"
        return shown[:32]
    if isinstance(value, str):
        return repr(value[:40]) if text else "a string"
    if isinstance(value, bytes):
        return "no JSON"
    return "a list" if isinstance(value, list) else "an object"
