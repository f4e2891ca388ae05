"""Which file of a repository needs which, and the order that puts what is needed first.

DeepSeek-Coder (arXiv 2401.14196), section 2.2, Algorithm 1.
"""

from __future__ import annotations

import heapq
import posixpath
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property

_JS_SUFFIXES = (".ts", ".tsx", ".mts", ".cts", ".js", ".jsx", ".mjs", ".cjs", ".d.ts", ".json")
_RUST_ROOTS = ("mod.rs", "lib.rs", "main.rs")
_ROOTS = ("", "src", "lib", "python")  # where Python packages stand below a project's folder


def dependency_order(needs: Mapping[str, Collection[str]]) -> list[list[str]]:
    """One list for each connected part, in which a file stands after the files that it needs.

    `needs`: file → the files it depends on; names outside its keys and itself are ignored. Always
    the file with the fewest needs left comes next, which is a topological sort without cycles and
    still an order with them. Ties go by path, parts by their first path.
    """
    needed = {file: sorted({n for n in needs[file] if n in needs} - {file}) for file in needs}
    needed_by: dict[str, list[str]] = {file: [] for file in needs}
    for file, others in needed.items():
        for other in others:
            needed_by[other].append(file)
    return [_order(part, needed, needed_by) for part in _parts(needed, needed_by)]


def _parts(
    needed: Mapping[str, list[str]], needed_by: Mapping[str, list[str]]
) -> Iterable[list[str]]:
    seen: set[str] = set()
    for first in sorted(needed):
        if first in seen:
            continue
        seen.add(first)
        part, pending = [], [first]
        while pending:
            file = pending.pop()
            part.append(file)
            for other in (*needed[file], *needed_by[file]):
                if other not in seen:
                    seen.add(other)
                    pending.append(other)
        yield part


def _order(
    part: list[str], needed: Mapping[str, list[str]], needed_by: Mapping[str, list[str]]
) -> list[str]:
    left = {file: len(needed[file]) for file in part}
    heap = [(count, file) for file, count in left.items()]
    heapq.heapify(heap)
    order: list[str] = []
    done: set[str] = set()
    while heap:
        count, file = heapq.heappop(heap)
        if file in done or count != left[file]:
            continue  # an entry that a smaller count has replaced
        done.add(file)
        order.append(file)
        for other in needed_by[file]:
            left[other] -= 1
            if other not in done:
                heapq.heappush(heap, (left[other], other))
    return order


class PathIndex:
    """The files of a repository by path, to find what an import means."""

    def __init__(self, paths: Iterable[str], go_modules: Mapping[str, str] | None = None) -> None:
        """`paths`: from the root, with forward slashes. `go_modules`: go.mod's folder → module."""
        self._paths = sorted(set(paths))
        self._known = frozenset(self._paths)
        self._go_modules = dict(go_modules or {})

    def resolve(self, language: str, path: str, name: str) -> list[str]:
        """The files that `name`, imported by the file `path`, stands for; none when it is not here.

        `name` as `syntax.imports` gives it.
        """
        if language == "Python":
            found = self._python(path, name)
        elif language in ("JavaScript", "TypeScript", "TSX"):
            found = self._javascript(path, name)
        elif language == "Java":
            found = self._java(path, name)
        elif language == "Go":
            found = self._go(name)
        elif language in ("C", "C++", "CUDA"):
            found = self._include(path, name)
        elif language == "Rust":
            found = self._rust(path, name)
        else:
            found = []
        return [other for other in found if other != path]

    # Finding

    @cached_property
    def _by_name(self) -> Mapping[str, list[str]]:
        names: dict[str, list[str]] = {}
        for path in self._paths:
            names.setdefault(posixpath.basename(path), []).append(path)
        return names

    @cached_property
    def _folders(self) -> Mapping[str, list[str]]:
        folders: dict[str, list[str]] = {}
        for path in self._paths:
            folders.setdefault(posixpath.dirname(path), []).append(path)
        return folders

    def _first(self, *candidates: str) -> list[str]:
        for candidate in candidates:
            clean = posixpath.normpath(candidate)
            if clean in self._known:
                return [clean]
        return []

    def _ending(self, suffix: str, near: str) -> list[str]:
        """The path that is or ends in `suffix` and shares most folders with `near`."""
        found = [
            path
            for path in self._by_name.get(posixpath.basename(suffix), ())
            if path == suffix or path.endswith("/" + suffix)
        ]
        return (
            [min(found, key=lambda path: (-_shared(path, near), len(path), path))][:1]
            if found
            else []
        )

    # Languages

    def _python(self, path: str, name: str) -> list[str]:
        dots = len(name) - len(name.lstrip("."))
        parts = [part for part in name[dots:].split(".") if part]
        if dots:
            base = posixpath.dirname(path)
            for _ in range(dots - 1):
                if not base:
                    return []
                base = posixpath.dirname(base)
            # `from . import x`: a module, or else a name in the package itself
            package = posixpath.join(base, "__init__.py")
            return self._python_module(base, parts) or self._first(package)
        # An absolute name starts in a folder that is no package: one above this file, or its src.
        folder = posixpath.dirname(path)
        while True:
            if posixpath.join(folder, "__init__.py") not in self._known:
                for root in _ROOTS:
                    found = self._python_module(posixpath.join(folder, root), parts)
                    if found:
                        return found
            if not folder:
                break
            folder = posixpath.dirname(folder)
        # The repository's folder may be the package, or a link in it may name its folders.
        return self._python_module("", parts[1:]) if len(parts) > 2 else []

    def _python_module(self, base: str, parts: list[str]) -> list[str]:
        """The last part may be a name in a module rather than a module."""
        for n in range(len(parts), max(0, len(parts) - 2), -1):
            stem = posixpath.join(base, *parts[:n])
            found = self._first(stem + ".py", stem + "/__init__.py", stem + ".pyi")
            if found:
                return found
        return []

    def _javascript(self, path: str, name: str) -> list[str]:
        if not name.startswith("."):
            return []
        stem = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
        bare = stem.rsplit(".", 1)[0] if stem.endswith((".js", ".jsx", ".mjs", ".cjs")) else stem
        return self._first(
            stem,
            *(stem + suffix for suffix in _JS_SUFFIXES),
            *(bare + suffix for suffix in _JS_SUFFIXES),  # TypeScript writes ./x.js for x.ts
            *(f"{stem}/index{suffix}" for suffix in _JS_SUFFIXES),
        )

    def _java(self, path: str, name: str) -> list[str]:
        parts = name.split(".")
        if len(parts) == 1:  # a class of the same package
            return self._first(posixpath.join(posixpath.dirname(path), name + ".java"))
        if parts[-1] == "*":
            folder = "/".join(parts[:-1])
            inside = [f for f in self._folders if f == folder or f.endswith("/" + folder)]
            if inside:
                return [p for p in self._folders[min(inside)] if p.endswith(".java")]
            parts = parts[:-1]  # the members of a class
        for n in range(
            len(parts), 1, -1
        ):  # a nested class or a static member stands behind its class
            found = self._ending("/".join(parts[:n]) + ".java", path)
            if found:
                return found
        return []

    def _go(self, name: str) -> list[str]:
        for base, module in sorted(self._go_modules.items(), key=lambda item: -len(item[1])):
            if name == module or name.startswith(module + "/"):
                folder = posixpath.join(base, name[len(module) + 1 :]).rstrip("/")
                return [
                    path
                    for path in self._folders.get(folder, ())
                    if path.endswith(".go") and not path.endswith("_test.go")
                ]
        return []

    def _include(self, path: str, name: str) -> list[str]:
        beside = self._first(posixpath.join(posixpath.dirname(path), name))
        return beside or self._ending(posixpath.normpath(name).lstrip("./"), path)

    def _rust(self, path: str, name: str) -> list[str]:
        parts = name.split("::")
        here = _rust_folder(path)
        if parts[0] == "crate":
            return self._rust_module(self._crate(path), parts[1:])
        if parts[0] in ("self", "super"):
            while parts and parts[0] in ("self", "super"):
                here = posixpath.dirname(here) if parts[0] == "super" else here
                parts = parts[1:]
            return self._rust_module(here, parts)
        # Another crate of the workspace, its folder named as it is; or a module declared here.
        for root in (parts[0], parts[0].replace("_", "-")):
            for file in ("lib.rs", "main.rs"):
                found = self._ending(f"{root}/src/{file}", path)
                if found and posixpath.dirname(found[0]) != self._crate(path):
                    return self._rust_module(posixpath.dirname(found[0]), parts[1:])
        return self._rust_module(here, parts, or_itself=False)

    def _rust_module(self, folder: str, parts: list[str], *, or_itself: bool = True) -> list[str]:
        for n in range(len(parts), 0, -1):
            stem = posixpath.join(folder, *parts[:n])
            found = self._first(stem + ".rs", stem + "/mod.rs")
            if found:
                return found
        if not or_itself:
            return []
        # The name is an item of the module itself.
        own = (folder + ".rs",) if folder else ()
        return self._first(*own, *(posixpath.join(folder, file) for file in _RUST_ROOTS))

    def _crate(self, path: str) -> str:
        """The folder of the crate's root module."""
        folder = posixpath.dirname(path)
        while True:
            if any(posixpath.join(folder, f) in self._known for f in ("lib.rs", "main.rs")):
                return folder
            if not folder:
                return posixpath.dirname(path)
            folder = posixpath.dirname(folder)


def _rust_folder(path: str) -> str:
    """Where the modules inside this one are."""
    if posixpath.basename(path) in _RUST_ROOTS:
        return posixpath.dirname(path)
    return path.removesuffix(".rs")


def _shared(one: str, other: str) -> int:
    """Leading folders in common."""
    n = 0
    for a, b in zip(
        posixpath.dirname(one).split("/"), posixpath.dirname(other).split("/"), strict=False
    ):
        if a != b:
            break
        n += 1
    return n
