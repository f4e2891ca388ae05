"""Programming languages by file name, and how a comment is written in each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath


@dataclass(frozen=True)
class Language:
    name: str
    comment: str  # `{}` stands for the text; DeepSeek Coder writes `#utils.py`, without a space
    suffixes: tuple[str, ...]
    names: tuple[str, ...] = ()  # whole file names


LANGUAGES = (
    Language("Python", "#{}", (".py", ".pyi")),
    Language("JavaScript", "//{}", (".js", ".jsx", ".mjs", ".cjs")),
    Language("TypeScript", "//{}", (".ts", ".mts", ".cts")),
    Language("TSX", "//{}", (".tsx",)),
    Language("Java", "//{}", (".java",)),
    Language("Go", "//{}", (".go",)),
    Language("C", "//{}", (".c", ".h")),
    Language("C++", "//{}", (".cc", ".cpp", ".cxx", ".hh", ".hpp", ".hxx")),
    Language("CUDA", "//{}", (".cu", ".cuh")),
    Language("Rust", "//{}", (".rs",)),
    Language("C#", "//{}", (".cs",)),
    Language("PHP", "//{}", (".php",)),
    Language("Ruby", "#{}", (".rb",)),
    Language("Kotlin", "//{}", (".kt", ".kts")),
    Language("Swift", "//{}", (".swift",)),
    Language("Scala", "//{}", (".scala",)),
    Language("Dart", "//{}", (".dart",)),
    Language("Shell", "#{}", (".sh", ".bash")),
    Language("Perl", "#{}", (".pl", ".pm")),
    Language("Lua", "--{}", (".lua",)),
    Language("R", "#{}", (".r",)),
    Language("Julia", "#{}", (".jl",)),
    Language("Haskell", "--{}", (".hs",)),
    Language("OCaml", "(*{}*)", (".ml", ".mli")),
    Language("Elixir", "#{}", (".ex", ".exs")),
    Language("SQL", "--{}", (".sql",)),
    Language("HTML", "<!--{}-->", (".html", ".htm")),
    Language("CSS", "/*{}*/", (".css", ".scss")),
    Language("XSLT", "<!--{}-->", (".xsl", ".xslt")),
    Language("JSON", "//{}", (".json",)),
    Language("YAML", "#{}", (".yaml", ".yml")),
    Language("Protocol Buffers", "//{}", (".proto",)),
    Language("CMake", "#{}", (".cmake",), ("cmakelists.txt",)),
    Language("Makefile", "#{}", (".mk",), ("makefile", "gnumakefile")),
    Language("Dockerfile", "#{}", (), ("dockerfile",)),
)

# Text for people. It has no comments, and goes in without its path.
PROSE = {".md": "Markdown", ".markdown": "Markdown", ".rst": "reStructuredText"}
PLAIN_TEXT = "Text"

_BY_NAME = {language.name: language for language in LANGUAGES}
_BY_SUFFIX = {suffix: language.name for language in LANGUAGES for suffix in language.suffixes}
_BY_FILE = {name: language.name for language in LANGUAGES for name in language.names}

# What C does not have, at the start of a line. A .h file is C unless one of these is in it.
_CPP = re.compile(r"^\s*(?:namespace|template|class|using|public:|private:)\b", re.MULTILINE)


def language_of(path: str) -> str | None:
    """The language of a source file by its name; None for anything else."""
    name = PurePosixPath(path).name.lower()
    return _BY_FILE.get(name) or _BY_SUFFIX.get(PurePosixPath(name).suffix)


def prose_of(path: str) -> str | None:
    """The kind of a text for people by its name: Markdown, reStructuredText, a plain README."""
    name = PurePosixPath(path).name.lower()
    suffix = PurePosixPath(name).suffix
    if suffix in ("", ".txt") and name.startswith("readme"):
        return PLAIN_TEXT
    return PROSE.get(suffix)


def refine(language: str, path: str, text: str) -> str:
    """The language once the text is known: a header may be C or C++."""
    if language == "C" and path.lower().endswith(".h") and _CPP.search(text):
        return "C++"
    return language


def path_comment(language: str, path: str) -> str:
    """The comment line that stands above a file in a joined repository: `#utils.py`."""
    return _BY_NAME[language].comment.format(path) + "\n"
