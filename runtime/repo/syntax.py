"""Syntax trees by tree-sitter: errors in a file, and what it imports."""

from __future__ import annotations

import ast
import re
import warnings
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from dsq.errors import InputError

if TYPE_CHECKING:
    from tree_sitter import Language, Node, Query, Tree

# Language → the module of its grammar and the function in there.
_GRAMMARS = {
    "Python": ("tree_sitter_python", "language"),
    "JavaScript": ("tree_sitter_javascript", "language"),
    "TypeScript": ("tree_sitter_typescript", "language_typescript"),
    "TSX": ("tree_sitter_typescript", "language_tsx"),
    "Java": ("tree_sitter_java", "language"),
    "Go": ("tree_sitter_go", "language"),
    "C": ("tree_sitter_c", "language"),
    "C++": ("tree_sitter_cpp", "language"),
    "Rust": ("tree_sitter_rust", "language"),
}
PARSED = frozenset(_GRAMMARS)

# Macros make text that no grammar knows, so C is allowed errors in this share of its bytes. (Of
# 544 kernel headers that compile, 49 have an error node and 3 have more than this; of libstdc++'s
# 130, 124 and 28.)
_TOLERATED = {"C": 0.05, "C++": 0.05}

_JS = """
(import_statement source: (string (string_fragment) @name))
(export_statement source: (string (string_fragment) @name))
(call_expression function: (import) arguments: (arguments . (string (string_fragment) @name)))
((call_expression
  function: (identifier) @_f arguments: (arguments . (string (string_fragment) @name)))
 (#eq? @_f "require"))
"""
_TS = _JS + "(import_require_clause source: (string (string_fragment) @name))"
_C = "(preproc_include path: [(string_literal) (system_lib_string)] @name)"
_QUERIES = {
    "Python": "(import_statement) @name (import_from_statement) @name",
    "JavaScript": _JS,
    "TypeScript": _TS,
    "TSX": _TS,
    # Classes of the same package need no import, so a type's name counts as one.
    "Java": """
(import_declaration) @name
(type_identifier) @type
(method_invocation object: (identifier) @type)
(field_access object: (identifier) @type)
""",
    "Go": "(import_spec path: [(interpreted_string_literal) (raw_string_literal)] @name)",
    "C": _C,
    "C++": _C,
    "Rust": """
(mod_item name: (identifier) @module !body)
(use_declaration argument: (_) @name)
""",
}


def require_parsers(otherwise: str = "give plain text with --text") -> None:
    """Raise InputError, naming the extra, when a package for reading repositories is missing.

    `otherwise`: what to do instead of installing it.
    """
    try:
        for module, _ in _GRAMMARS.values():
            import_module(module)
        for module in ("tree_sitter", "pathspec", "datasketch"):
            import_module(module)
    except ImportError as error:
        raise InputError(
            f"reading repositories needs packages that are not installed ({error}); "
            f"pip install 'dsq[calibrate]', or {otherwise}"
        ) from error


def syntax_fault(language: str, text: str) -> bool:
    """Whether the text has syntax errors; False for a language without a parser here.

    Python by this Python's own parser, the others by tree-sitter.
    """
    if language == "Python":
        return python_tree(text) is None
    if language not in _GRAMMARS:
        return False
    data = text.encode()
    share = _error_share(_parse(language, data), len(data))
    return share > _TOLERATED.get(language, 0.0)


_DEEPEST = 2000  # brackets


def _depth(text: str) -> int:
    depth = deepest = 0
    for bracket in re.findall(r"[()\[\]{}]", text):
        depth = depth + 1 if bracket in "([{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def imports(language: str, text: str) -> list[str]:
    """What the text imports, as `dependencies.PathIndex.resolve` reads it.

    Works on text with syntax errors as well: what is being typed has some. Of text nested
    deeper than `_DEEPEST` nothing is read: a query takes time by the square of the depth, and all
    threads wait for it. (tree-sitter's own progress callback crashed the process.)
    """
    if language not in _GRAMMARS or _depth(text) > _DEEPEST:
        return []
    from tree_sitter import QueryCursor

    data = text.encode()
    captures = QueryCursor(_query(language)).captures(_parse(language, data).root_node)
    found: dict[str, None] = {}  # a set in order
    for capture, nodes in captures.items():
        for node in nodes:
            for name in _names(language, capture, node):
                found[name] = None
    return list(found)


@cache
def _language(name: str) -> Language:
    from tree_sitter import Language

    module, function = _GRAMMARS[name]
    return Language(getattr(import_module(module), function)())


@cache
def _query(name: str) -> Query:
    from tree_sitter import Query

    return Query(_language(name), _QUERIES[name])


def _parse(language: str, data: bytes) -> Tree:
    from tree_sitter import Parser

    return Parser(_language(language)).parse(data)


def python_tree(text: str) -> ast.Module | None:
    """The module's tree by this Python's own parser; None when it has syntax errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes and the like, in code that is not ours
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def _error_share(tree: Tree, n_bytes: int) -> float:
    """The share of bytes inside error nodes; a missing token counts as one byte."""
    bad, pending = 0, [tree.root_node]
    while pending:
        node = pending.pop()
        if node.is_error or node.is_missing:
            bad += max(1, node.end_byte - node.start_byte)
        elif node.has_error:
            pending.extend(node.children)
    return bad / max(1, n_bytes)


def _text(node: Node) -> str:
    return (node.text or b"").decode("utf-8", errors="replace")


def _names(language: str, capture: str, node: Node) -> list[str]:
    if capture == "type":
        return [_text(node)]
    if capture == "module":  # Rust's `mod name;` means the file name.rs
        return [f"self::{_text(node)}"]
    if capture.startswith("_"):
        return []
    if language == "Python":
        return _python_names(node)
    if language == "Java":
        words = _text(node).rstrip("; \n").split()
        return ["".join(word for word in words[1:] if word != "static")]
    if language == "Rust":
        return [_out_of(path, _inline_modules(node)) for path in _rust_paths(_text(node))]
    return [_text(node).strip('"<>`')]


def _python_names(node: Node) -> list[str]:
    """`import a.b` → a.b; `from .a import b, c` → .a.b, .a.c; `from a import *` → a."""
    names = []
    for child in node.children_by_field_name("name"):
        target = child.child_by_field_name("name") if child.type == "aliased_import" else child
        names.append(_text(target or child))
    if node.type == "import_statement":
        return names
    module = node.child_by_field_name("module_name")
    base = "".join(_text(module).split()) if module else ""
    dot = "" if base.endswith(".") or not base else "."
    return [f"{base}{dot}{name}" for name in names] or [base]


def _rust_paths(use: str) -> list[str]:
    """`a::{b, c::{self, d as e}}` → a::b, a::c, a::d."""
    text = "".join(use.replace(" as ", "\0").split())
    head, brace, rest = text.partition("{")
    if not brace:
        return [text.partition("\0")[0].removesuffix("::self").removesuffix("::*")]
    depth, start, parts = 0, 0, []
    inner = rest.rpartition("}")[0]
    for i, char in enumerate(inner + ","):
        depth += (char == "{") - (char == "}")
        if char == "," and depth == 0:
            parts.append(inner[start:i])
            start = i + 1
    return [path for part in parts if part for path in _rust_paths(head + part)]


def _inline_modules(node: Node) -> int:
    """How many `mod x { … }` of the same file are around a node."""
    n, outer = 0, node.parent
    while outer is not None:
        n += outer.type == "mod_item"
        outer = outer.parent
    return n


def _out_of(path: str, n_modules: int) -> str:
    """A path as the file's own module would write it: `super` leaves an inline module first."""
    parts = path.split("::")
    n = 0
    while n < min(n_modules, len(parts)) and parts[n] == "super":
        n += 1
    return "::".join(["self", *parts[n:]]) if n else path
