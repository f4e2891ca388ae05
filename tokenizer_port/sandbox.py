"""A jinja2 environment in which a hostile chat template can neither escape nor run away.

Escapes (attribute walks, changing the caller's data) are jinja2's own sandbox's work. Running away
is bounded here: every loop turn, call, filter and operator is counted against a budget of steps
and seconds, and whatever could build a large value in one step is measured before it is done.
Not measured: comparing two values that are each nested some thirty deep by sharing.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_STEPS = 1_000_000
MAX_SECONDS = 5.0
MAX_SIZE = 4 * 2**20  # characters or elements of one value, and of the whole output
MAX_TOTAL = 64 * 2**20  # of all values together
MAX_WIDTH = 100  # of an indent or a rounding


class Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self.steps = MAX_STEPS
        self.size = MAX_TOTAL
        self.deadline = time.monotonic() + MAX_SECONDS

    def tick(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it takes more than {MAX_SECONDS:.0f} seconds")

    def spend(self, size: int) -> None:
        self.size -= size
        if size > MAX_SIZE or self.size < 0:
            raise SecurityError(f"it builds values larger than {MAX_SIZE}, or {MAX_TOTAL} in all")


_BUDGET: ContextVar[Budget] = ContextVar("budget")


def start_budget() -> None:
    _BUDGET.set(Budget())


def _tick() -> None:
    _BUDGET.get().tick()


def _spend(size: int) -> None:
    _BUDGET.get().spend(size)


def _size(value: Any) -> int:
    """How long a value's text could be, counting shared parts as often as they would be written."""
    total = 0
    stack = [value]
    while stack:
        item = stack.pop()
        total += len(item) if isinstance(item, (str, bytes)) else 8
        if isinstance(item, int):
            total += item.bit_length() // 3
        elif isinstance(item, Mapping):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack.extend(item)
        if total > MAX_SIZE:
            break
    _spend(total)
    return total


def _bounded(iterable: Iterable[Any]) -> Iterator[Any]:
    for item in iterable:
        _tick()
        yield item


def _concat(values: list[Any]) -> str:
    """`a ~ b`"""
    _tick()
    _size(values)
    return "".join(map(str, values))


def _join(value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    items = list(_bounded(value))
    if attribute is not None:
        items = [_attribute(item, attribute) for item in items]
    _spend(_size(items) + len(items) * len(str(d)))
    return str(d).join(map(str, items))


def _attribute(item: Any, attribute: str | int) -> Any:
    try:
        return item[attribute]
    except (TypeError, LookupError):
        return ""


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(value), str(old), str(new)
    _spend(len(text) + text.count(old) * len(new))
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
    abs attr count d default first float int items last length map reject rejectattr reverse select
    selectattr
    """.split()
)


def guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that counts as a step, on values and widths that are not too large."""

    @functools.wraps(function)  # keeps jinja2's marks (pass_environment and so on)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        _tick()
        if name in _LIGHT_FILTERS:
            return function(*args, **kwargs)
        values = [v for v in (*args, *kwargs.values()) if not isinstance(v, _JINJA_OWN)]
        size = _size(values)
        if name in ("indent", "round", "tojson") and any(map(_is_wide, values[1:])):
            raise SecurityError(f"{name} is given a width of more than {MAX_WIDTH}")
        if name == "indent":
            _spend(MAX_WIDTH * str(values[0]).count("\n"))
        elif name == "list":
            _spend(16 * size)
        return function(*args, **kwargs)

    return filtered


_JINJA_OWN = (jinja2.Environment, Context, nodes.EvalContext)


def _is_wide(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) > MAX_WIDTH
    return isinstance(value, int) and abs(value) > MAX_WIDTH


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """As transformers sets it up (trim_blocks, lstrip_blocks, break and continue), bounded."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

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
        self.filters.update(join=_join, replace=_replace)
        self.filters = {name: guarded(name, filter_) for name, filter_ in self.filters.items()}
        self.filters.update(dsq_bounded=_bounded, dsq_concat=_concat)
        self.globals.pop("lipsum", None)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = Parser(self, source, name, filename).parse()
        _instrument(template)
        return template.set_environment(self)  # type: ignore[return-value]

    def getattr(self, obj: Any, attribute: str) -> Any:
        _tick()
        if isinstance(obj, (int, float, bytes)):
            return self.undefined(obj=obj, name=attribute)
        if isinstance(obj, str) and attribute not in _STR_METHODS and hasattr(obj, attribute):
            raise SecurityError(f"it uses str.{attribute}, which is not allowed")
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _tick()
        if isinstance(obj, (str, int, float, bytes)) and isinstance(argument, str):
            return self.getattr(obj, argument)
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            name = __obj.__name__
            if name == "join" and args:
                return _join(args[0], owner)
            if name == "replace" and len(args) >= 2:
                return _replace(owner, *args)
            _spend(len(owner) * (16 if "split" in name else 1))
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text = value.__self__

        def format_(*args: Any, **kwargs: Any) -> str:
            if _WIDE_FORMAT.search(text):
                raise SecurityError(f"it formats with a width of more than {MAX_WIDTH}")
            _spend(len(text) + text.count("{") * _size([*args, *kwargs.values()]))
            return wrapped(*args, **kwargs)

        return format_

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _tick()
        if operator == "+" and isinstance(left, (str, list, tuple)) and hasattr(right, "__len__"):
            _spend(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            if _WIDE_PERCENT.search(left):
                raise SecurityError(f"it formats with a width of more than {MAX_WIDTH}")
            _spend(len(left) + left.count("%") * _size(right))
        elif operator == "*":
            _check_product(left, right)
        elif operator == "**" and not (abs(left) <= 1000 and abs(right) <= 1000):
            raise SecurityError("it raises to a power of more than 1000")
        return super().call_binop(context, operator, left, right)


def _check_product(left: Any, right: Any) -> None:
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, (str, bytes, list, tuple)) and isinstance(count, int):
            _spend(len(sequence) * max(count, 0))
    if isinstance(left, int) and isinstance(right, int):
        _spend(left.bit_length() + right.bit_length())


@jinja2.pass_context  # a context function is not called at compile time
def _finalize(context: Context, value: Any) -> Any:
    _size(value)
    return value


def _instrument(template: nodes.Template) -> None:
    """Count the turns of every loop, and measure every `~`."""
    for loop in list(template.find_all(nodes.For)):
        loop.iter = nodes.Filter(loop.iter, "dsq_bounded", [], [], None, None, lineno=loop.lineno)
    _replace_concats(template)


def _replace_concats(node: nodes.Node) -> None:
    for field, value in node.iter_fields():
        if isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, nodes.Node):
                    value[i] = _without_concat(item)
        elif isinstance(value, nodes.Node):
            setattr(node, field, _without_concat(value))


def _without_concat(node: nodes.Node) -> nodes.Node:
    _replace_concats(node)
    if isinstance(node, nodes.Concat):
        values = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(values, "dsq_concat", [], [], None, None, lineno=node.lineno)
    return node


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training: its content, unchanged."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
