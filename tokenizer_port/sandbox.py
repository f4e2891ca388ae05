"""A jinja2 environment in which a hostile chat template can neither escape nor run away.

Escapes (attribute walks, changing the caller's data) are jinja2's own sandbox's work. Running away
is bounded here: every loop turn, call, filter and operator is counted against a `budget` of steps
and seconds, and whatever could build a large value in one step, or walk through one (comparing,
hashing), is measured before it is done.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from dsq.tokenizer_port.budget import (
    CONTAINERS,
    ELEMENT,
    bounded,
    measure,
    size,
    spend,
    spend_copy,
    tick,
)

MAX_WIDTH = 100  # of an indent or a rounding
MAX_BITS = 1 << 16  # of a number: dividing larger ones takes seconds


def _concat(values: list[Any]) -> str:
    """`a ~ b`"""
    tick()
    size(values)
    return "".join(map(str, values))


def _join(value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    items = _list(value)
    if attribute is not None:
        items = [_attribute(item, attribute) for item in items]
    spend(measure(items) + len(items) * len(str(d)))
    return str(d).join(map(str, items))


def _attribute(item: Any, attribute: str | int) -> Any:
    try:
        return item[attribute]
    except (TypeError, LookupError):
        return ""


def _list(value: Iterable[Any]) -> list[Any]:
    items = list(bounded(value))
    spend_copy(items)
    return items


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    found = dict(*map(_ticking, args), **kwargs)
    spend_copy(found)
    return found


def _namespace(*args: Any, **kwargs: Any) -> Namespace:
    return Namespace(_dict(*args, **kwargs))


def _ticking(value: Any) -> Any:
    """What makes its elements one by one makes them step by step."""
    lazy = isinstance(value, Iterable) and not hasattr(value, "__len__")
    return bounded(value) if lazy or isinstance(value, range) else value


def _built(value: Any) -> Any:
    """`[a, b]`, `x[1:]`"""
    tick()
    spend_copy(value)
    return value


def _walked(value: Any) -> Any:
    """What is compared or hashed."""
    if isinstance(value, CONTAINERS):
        tick()
        measure(value)
    return value


def _joined_pieces(pieces: Iterable[str]) -> str:
    """The text of a macro, a block, a captured `set`."""
    found = list(pieces)
    spend(sum(map(len, found)))
    return "".join(found)


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(value), str(old), str(new)
    spend(len(text) + text.count(old) * len(new))
    return text.replace(old, new) if count is None else text.replace(old, new, count)


# Methods of str whose result is no longer than what goes in, or is measured before the call.
_STR_METHODS = frozenset(
    """
    strip lstrip rstrip removeprefix removesuffix lower upper title capitalize casefold swapcase
    startswith endswith find rfind index rindex count split rsplit splitlines partition rpartition
    join replace format isdigit isalpha isalnum isspace isupper islower isnumeric isdecimal
    istitle isidentifier isascii isprintable
    """.split()
)
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(\*|\d{3})")
_WIDE_FORMAT = re.compile(r"\{[^{}]+\{|\{[^{}]*:[^{}]*\d{3}")

# Filters left out: no template needs them, and each can build much out of little.
_NO_FILTERS = (
    *("center", "filesizeformat", "format", "pprint", "random", "urlize", "wordwrap", "xmlattr"),
    *("batch", "slice", "striptags", "truncate"),
)
# Filters that build nothing from their input, so that it need not be measured.
_LIGHT_FILTERS = frozenset(
    """
    abs attr count d default first float int items last length list map reject rejectattr select
    selectattr
    """.split()
)
_COMPARING_TESTS = frozenset(
    "eq == equalto ne != lt < lessthan le <= gt > greaterthan ge >= in".split()
)


def guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that counts as a step, on values and widths that are not too large."""

    @functools.wraps(function)  # keeps jinja2's marks (pass_environment and so on)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        tick()
        if name in _LIGHT_FILTERS:
            return function(*args, **kwargs)
        args = tuple(map(_ticking, args))
        values = [v for v in (*args, *kwargs.values()) if not isinstance(v, _JINJA_OWN)]
        size(values)
        if name in ("indent", "round", "tojson") and any(map(_is_wide, values[1:])):
            raise SecurityError(f"{name} is given a width of more than {MAX_WIDTH}")
        if name == "indent":
            spend(MAX_WIDTH * str(values[0]).count("\n"))
        return function(*args, **kwargs)

    return filtered


def _comparing(test: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(test)
    def tested(*args: Any) -> Any:
        return test(*map(_walked, args))

    return tested


_JINJA_OWN = (jinja2.Environment, Context, nodes.EvalContext)


def _is_wide(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) > MAX_WIDTH
    return isinstance(value, int) and abs(value) > MAX_WIDTH


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """As transformers sets it up (trim_blocks, lstrip_blocks, break and continue), bounded."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    concat = staticmethod(_joined_pieces)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            optimized=False,  # constant expressions are not computed at compile time, unmeasured
            finalize=_finalize,
        )
        for name in _NO_FILTERS:
            self.filters.pop(name, None)
        self.filters.update(join=_join, list=_list, replace=_replace)
        self.filters = {name: guarded(name, filter_) for name, filter_ in self.filters.items()}
        self.filters.update(
            dsq_bounded=bounded, dsq_concat=_concat, dsq_built=_built, dsq_walked=_walked
        )
        tests: dict[str, Any] = self.tests
        tests.update({name: _comparing(tests[name]) for name in _COMPARING_TESTS})
        self.globals.pop("lipsum", None)
        self.globals.update(dict=_dict, namespace=_namespace)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = Parser(self, source, name, filename).parse()
        _instrument(template)
        return template.set_environment(self)  # type: ignore[return-value]

    def getattr(self, obj: Any, attribute: str) -> Any:
        tick()
        if isinstance(obj, (int, float, bytes)):
            return self.undefined(obj=obj, name=attribute)
        if isinstance(obj, str) and attribute not in _STR_METHODS and hasattr(obj, attribute):
            raise SecurityError(f"it uses str.{attribute}, which is not allowed")
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        tick()
        _walked(argument)
        if isinstance(obj, (str, int, float, bytes)) and isinstance(argument, str):
            return self.getattr(obj, argument)
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            name = __obj.__name__
            if name == "join" and args:
                return _join(args[0], owner)
            if name == "replace" and len(args) >= 2:
                return _replace(owner, *args)
            spend(len(owner) * (16 if "split" in name else 1))
        elif isinstance(owner, CONTAINERS):
            if __obj.__name__ == "copy":
                spend_copy(owner)
            elif __obj.__name__ in ("count", "index"):
                measure(owner)
        for value in (*args, *kwargs.values()):
            _walked(value)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text = value.__self__

        def format_(*args: Any, **kwargs: Any) -> str:
            if _WIDE_FORMAT.search(text):
                raise SecurityError(f"it formats with a width of more than {MAX_WIDTH}")
            spend(len(text) + text.count("{") * size([*args, *kwargs.values()]))
            return wrapped(*args, **kwargs)

        return format_

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        tick()
        if operator == "+" and isinstance(left, (str, list, tuple)) and hasattr(right, "__len__"):
            spend_copy(left)
            spend_copy(right)
        elif operator == "%" and isinstance(left, str):
            if _WIDE_PERCENT.search(left):
                raise SecurityError(f"it formats with a width of more than {MAX_WIDTH}")
            spend(len(left) + left.count("%") * size(right))
        elif operator == "*":
            _check_product(left, right)
        elif operator == "**" and not (abs(left) <= 1000 and abs(right) <= 1000):
            raise SecurityError("it raises to a power of more than 1000")
        return super().call_binop(context, operator, left, right)


def _check_product(left: Any, right: Any) -> None:
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, (str, bytes, list, tuple)) and isinstance(count, int):
            element = 1 if isinstance(sequence, (str, bytes)) else ELEMENT
            spend(element * len(sequence) * max(count, 0))
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length()
        if bits > MAX_BITS:
            raise SecurityError(f"it multiplies to a number of more than {MAX_BITS} bits")


@jinja2.pass_context  # a context function is not called at compile time
def _finalize(context: Context, value: Any) -> Any:
    size(value)
    return value


def _instrument(node: nodes.Node) -> None:
    """Put what counts and measures around every expression that needs it, from the inside out."""
    for field, value in list(node.iter_fields()):
        if isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, nodes.Node):
                    value[i] = _instrumented(item)
        elif isinstance(value, nodes.Node):
            setattr(node, field, _instrumented(value))
    if isinstance(node, nodes.For):
        node.iter = _filter("dsq_bounded", node.iter)
    elif isinstance(node, (nodes.Compare, nodes.Operand)):
        node.expr = _walked_node(node.expr)
    elif isinstance(node, nodes.Pair):
        node.key = _walked_node(node.key)


def _instrumented(node: nodes.Node) -> nodes.Node:
    _instrument(node)
    if isinstance(node, nodes.Concat):
        return _filter("dsq_concat", nodes.List(node.nodes, lineno=node.lineno))
    copies = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    literal = isinstance(node, (nodes.List, nodes.Dict)) or (
        isinstance(node, nodes.Tuple) and node.ctx == "load"
    )
    return _filter("dsq_built", node) if copies or literal else node


def _walked_node(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _filter("dsq_walked", node)


def _filter(name: str, node: nodes.Node) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training: its content, unchanged."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
