"""A JSON schema as a GBNF grammar: the part of JSON Schema that describes shapes.

Taken: types and lists of types, `properties` (in their order; those not `required` may be left
out), `additionalProperties` (false, the default here, or a schema when there are no `properties`),
`items`, `prefixItems`, `minItems`, `maxItems`, `enum`, `const`, `anyOf`, `oneOf` (as anyOf: a
grammar cannot exclude), `minLength`, `maxLength`, the formats date, time, date-time and uuid, and
`$ref` within the document. Everything else that narrows a value is refused: an answer that only
looks as if it kept to the schema is worse than an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dsq.errors import InputError, UnsupportedError

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}

MAX_RULES = 2000
MAX_DEPTH = 64
MAX_REPEAT = 1000  # llama.cpp unrolls repetitions
MAX_GRAMMAR = 256 * 1024

# White space is bounded, or a model may write nothing else for ever.
_BASE = {
    "ws": '| " " | "\\n" [ \\t]{0,20}',
    "char": r'[^"\\\x7F\x00-\x1F] | [\\] (["\\/bfnrt] | "u" [0-9a-fA-F]{4})',
    "string": r'"\"" char* "\""',
    "integer": '"-"? ("0" | [1-9] [0-9]{0,15})',
    "number": 'integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,3})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "value": "object | array | string | number | boolean | null",
    "object": '"{" ws (member ("," ws member)*)? "}"',
    "member": 'string ws ":" ws value ws',
    "array": '"[" ws (value ws ("," ws value ws)*)? "]"',
    "hex": "[0-9a-fA-F]",
    "date": '[0-9]{4} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | [1-2] [0-9] | "3" [0-1])',
    "time": (
        '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{3})? '
        '("Z" | [-+] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])'
    ),
}
_FORMATS = {
    "date": r'"\"" date "\""',
    "time": r'"\"" time "\""',
    "date-time": r'"\"" date "T" time "\""',
    "uuid": r'"\"" hex{8} "-" hex{4} "-" hex{4} "-" hex{4} "-" hex{12} "\""',
}
_SAY_NOTHING = frozenset(
    "title description default examples deprecated readOnly writeOnly $schema $id $comment "
    "$defs definitions strict".split()
)
_KEYS = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "format"},
    "integer": set[str](),
    "number": set[str](),
    "boolean": set[str](),
    "null": set[str](),
}


def schema_to_gbnf(schema: Mapping[str, Any] | bool) -> str:
    """The grammar of all JSON texts that the schema allows; see the module for what is taken.

    Raises InputError for what is no schema, UnsupportedError for what a grammar cannot hold.
    """
    writer = _Writer(schema)
    root = writer.expression(schema, "schema", 0)
    lines = [f"root ::= {root} ws", *(f"{n} ::= {rule}" for n, rule in writer.rules.items())]
    text = "\n".join(lines) + "\n"
    if len(text) > MAX_GRAMMAR:
        raise InputError(f"json_schema: its grammar has {len(text)} characters; shorten the schema")
    return text


class _Writer:
    def __init__(self, document: Any) -> None:
        self._document = document
        self.rules: dict[str, str] = {}
        self._references: dict[str, str] = {}
        self._uses("ws")

    def expression(self, schema: Any, where: str, depth: int) -> str:
        if depth > MAX_DEPTH:
            raise InputError(f"json_schema: is nested more than {MAX_DEPTH} deep; flatten it")
        if schema is True or schema == {}:
            return self._uses("value")
        if not isinstance(schema, Mapping):
            raise InputError(f"json_schema: {where} is no schema; an object is needed")
        if "$ref" in schema:
            self._only(schema, {"$ref"}, where)
            return self._reference(schema["$ref"], where, depth)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                self._only(schema, {key, "type"}, where)
                options = _list(schema[key], f"{where}.{key}")
                return self._choice(
                    self.expression(option, f"{where}.{key}[{i}]", depth + 1)
                    for i, option in enumerate(options)
                )
        if "enum" in schema:
            self._only(schema, {"enum", "type"}, where)
            return self._choice(_literal(v) for v in _list(schema["enum"], f"{where}.enum"))
        if "const" in schema:
            self._only(schema, {"const", "type"}, where)
            return _literal(schema["const"])
        return self._typed(schema, where, depth)

    def _typed(self, schema: Mapping[str, Any], where: str, depth: int) -> str:
        kinds = schema.get("type")
        if kinds is None:
            kinds = "object" if "properties" in schema else "array" if "items" in schema else None
        if kinds is None:
            self._only(schema, set(), where)
            return self._uses("value")
        names: list[Any] = kinds if isinstance(kinds, list) and kinds else [kinds]
        for name in names:
            if not isinstance(name, str) or name not in _KEYS:
                raise InputError(f"json_schema: {where}.type is {name!r}; it is {_or(_KEYS)}")
        self._only(schema, {"type"}.union(*(_KEYS[name] for name in names)), where)
        return self._choice(self._of_type(name, schema, where, depth) for name in names)

    def _of_type(self, kind: str, schema: Mapping[str, Any], where: str, depth: int) -> str:
        if kind == "object":
            return self._object(schema, where, depth)
        if kind == "array":
            return self._array(schema, where, depth)
        if kind == "string":
            return self._string(schema, where)
        return self._uses(kind)

    def _object(self, schema: Mapping[str, Any], where: str, depth: int) -> str:
        properties = schema.get("properties") or {}
        required = schema.get("required") or []
        more = schema.get("additionalProperties")
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise InputError(f"json_schema: {where}: properties is an object, required a list")
        unknown = [name for name in required if name not in properties]
        if unknown:
            raise UnsupportedError(
                f"json_schema: {where} requires {unknown[0]!r}, which is not among its properties; "
                "describe it there"
            )
        if not properties:
            if more is None or more is True:
                return self._uses("object")
            if more is False:
                return '"{" ws "}"'
            inner = self._rule(self.expression(more, f"{where}.additionalProperties", depth + 1))
            pair = self._rule(f'{self._uses("string")} ws ":" ws {inner} ws')
            return self._rule(f'"{{" ws ({pair} ("," ws {pair})*)? "}}"')
        if more not in (None, False):
            raise UnsupportedError(
                f"json_schema: {where} has properties and additionalProperties; a grammar here "
                "takes one of the two"
            )
        pairs = []
        for name, inner_schema in properties.items():
            inner = self.expression(inner_schema, f"{where}.{name}", depth + 1)
            pair = self._rule(f'{_literal(name)} ws ":" ws {self._rule(inner)} ws')
            pairs.append((pair, name in required))
        return self._rule(f'"{{" ws {self._members(pairs)} "}}"')

    def _members(self, pairs: Sequence[tuple[str, bool]]) -> str:
        """In order, commas between those that are there. `rest[i]`: pairs i … after a first one."""
        rest = ['""'] * (len(pairs) + 1)
        for i in range(len(pairs) - 1, -1, -1):
            pair, needed = pairs[i]
            one = f'"," ws {pair}'
            rest[i] = self._rule(f"{one if needed else f'({one})?'} {rest[i + 1]}")
        starts = []
        for i, (pair, needed) in enumerate(pairs):
            starts.append(f"{pair} {rest[i + 1]}")
            if needed:
                break
        else:
            starts.append('""')
        return self._choice(starts)

    def _array(self, schema: Mapping[str, Any], where: str, depth: int) -> str:
        first, items = schema.get("prefixItems") or [], schema.get("items")
        if isinstance(items, list) and not first:  # what prefixItems was called before 2020
            first, items = items, None
        if first:
            if items not in (None, False) or "minItems" in schema:
                raise UnsupportedError(
                    f"json_schema: {where}: prefixItems goes with no items and no minItems"
                )
            parts = [
                self._rule(self.expression(item, f"{where}.prefixItems[{i}]", depth + 1))
                for i, item in enumerate(_list(first, f"{where}.prefixItems"))
            ]
            return '"[" ws ' + ' "," ws '.join(f"{part} ws" for part in parts) + ' "]"'
        low = _bound(schema.get("minItems", 0), f"{where}.minItems")
        high = schema.get("maxItems")
        high = None if high is None else _bound(high, f"{where}.maxItems")
        _check_bounds(low, high, where)
        if high == 0:
            return '"[" ws "]"'
        inner = schema.get("items", True)
        item = self._rule(f"{self._rule(self.expression(inner, f'{where}.items', depth + 1))} ws")
        more = _repeat(max(0, low - 1), None if high is None else high - 1)
        some = f'{item} ("," ws {item}){more}'
        return self._rule(f'"[" ws {some if low else f"({some})?"} "]"')

    def _string(self, schema: Mapping[str, Any], where: str) -> str:
        if "format" in schema:
            if "minLength" in schema or "maxLength" in schema:
                raise UnsupportedError(f"json_schema: {where}: format goes with no length")
            found = _FORMATS.get(str(schema["format"]))
            if found is None:
                raise UnsupportedError(
                    f"json_schema: {where}.format is {schema['format']!r}; {_or(_FORMATS)} "
                    "are taken"
                )
            for name in ("date", "time", "hex"):
                self._uses(name)
            return self._rule(found)
        low = _bound(schema.get("minLength", 0), f"{where}.minLength")
        high = schema.get("maxLength")
        if not low and high is None:
            return self._uses("string")
        high = None if high is None else _bound(high, f"{where}.maxLength")
        _check_bounds(low, high, where)
        self._uses("char")
        return self._rule(rf'"\"" char{_repeat(low, high)} "\""')

    def _reference(self, name: Any, where: str, depth: int) -> str:
        if not isinstance(name, str) or not name.startswith("#"):
            raise UnsupportedError(f"json_schema: {where}.$ref leads out of the document")
        if name in self._references:
            return self._references[name]
        target = self._document
        for part in name[1:].split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(target, Mapping) or key not in target:
                raise InputError(f"json_schema: {where}.$ref is {name!r}, which is not there")
            target = target[key]
        rule = self._references[name] = f"ref{len(self._references)}"
        self.rules[rule] = ""  # the place in the order; a reference to itself finds the name
        self.rules[rule] = self.expression(target, name, depth + 1)
        if self.rules[rule] == rule:
            raise InputError(f"json_schema: {name!r} refers to nothing but itself")
        return rule

    def _only(self, schema: Mapping[str, Any], known: set[str], where: str) -> None:
        for key in schema:
            if key not in known and key not in _SAY_NOTHING:
                raise UnsupportedError(
                    f"json_schema: {where}: {str(key)!r} is not supported here; remove it"
                )

    def _choice(self, options: Any) -> str:
        found = list(dict.fromkeys(options))
        return found[0] if len(found) == 1 else f"({' | '.join(found)})"

    def _rule(self, expression: str) -> str:
        """A rule of its own for what is more than a name."""
        if re.fullmatch(r"[a-z0-9]+", expression):
            return expression
        name = f"r{len(self.rules)}"
        if len(self.rules) >= MAX_RULES:
            raise InputError(f"json_schema: needs more than {MAX_RULES} rules; shorten it")
        self.rules[name] = expression
        return name

    def _uses(self, name: str) -> str:
        """A rule of `_BASE`, and those that it needs."""
        if name not in self.rules:
            self.rules[name] = _BASE[name]
            bare = re.sub(r'"(\\.|[^"\\])*"|\[(\\.|[^\]\\])*\]', " ", _BASE[name])
            for word in re.findall(r"[a-z]+", bare):
                self._uses(word)
        return name


def _literal(value: Any) -> str:
    """The JSON text of a value, as a GBNF string."""
    text = json.dumps(value, ensure_ascii=False)
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise InputError(f"json_schema: {where} is no list with something in it")
    return value


def _bound(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_REPEAT:
        raise InputError(f"json_schema: {where} is no number from 0 to {MAX_REPEAT}")
    return value


def _check_bounds(low: int, high: int | None, where: str) -> None:
    if high is not None and low > high:
        raise InputError(f"json_schema: {where}: at least {low} and at most {high} is impossible")


def _repeat(low: int, high: int | None) -> str:
    return f"{{{low},{'' if high is None else high}}}"


def _or(names: Any) -> str:
    return ", ".join(names)
