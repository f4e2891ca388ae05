"""Which files of a repository stand before the one that is written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsq.errors import InputError
from dsq.runtime.repo.context import Context, ContextPlanner
from dsq.runtime.repo.dependencies import PathIndex
from dsq.runtime.repo.index import RepoGraph, RepoIndex, Source, inner_path
from dsq.runtime.source import Source as Model
from dsq.tokenizer_port.tokenizer import Tokenizer
from tests.runtime.corpus.conftest import write_files

ROOM = 10_000


@pytest.fixture(scope="module")
def planner(tiny: Path) -> ContextPlanner:
    return ContextPlanner(Tokenizer.from_vocabulary(Model(tiny).vocabulary))


def graph_of(texts: Mapping[str, str], needs: Mapping[str, set[str]] | None = None) -> RepoGraph:
    """A repository of Python files with these texts, which need each other as given."""
    needs = needs or {}
    sources = {
        path: Source("Python", text, (), frozenset(needs.get(path, ())))
        for path, text in texts.items()
    }
    return RepoGraph("r", sources, PathIndex(sources))


def on_disk(root: Path, files: dict[str, str]) -> RepoGraph:
    return RepoIndex(write_files(root, files)).graph()


def names(context: Context) -> list[str]:
    return [part.path for part in context.parts]


def text_of(planner: ContextPlanner, context: Context) -> str:
    return planner._tokenizer.decode(context.ids)


LANGUAGES = {
    "Python": ("app/main.py", "from app import util\n", {"app/util.py": "x = 1\n"}),
    "JavaScript": ("src/a.js", "const u = require('./util');\n", {"src/util.js": "let x;\n"}),
    "TypeScript": ("src/a.ts", "import { x } from './util';\n", {"src/util.ts": "export let x;\n"}),
    "Java": ("j/A.java", "class A { Util u; }\n", {"j/Util.java": "class Util {}\n"}),
    "Go": ("cmd/a.go", 'package m\nimport "ex.org/r/util"\n', {"util/u.go": "package util\n"}),
    "C": ("a.c", '#include "util.h"\n', {"util.h": "int x;\n"}),
    "C++": ("a.cpp", '#include "util.hpp"\n', {"util.hpp": "int x;\n"}),
    "Rust": ("src/main.rs", "mod util;\n", {"src/util.rs": "pub fn x() {}\n"}),
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_the_file_imports_stands_before_it(
    language: str, tmp_path: Path, planner: ContextPlanner
) -> None:
    path, text, imported = LANGUAGES[language]
    suffix = path.rpartition(".")[2]
    files = {
        **imported,
        f"other/alone.{suffix}": "\n// nobody\n" * 3,
        "go.mod": "module ex.org/r\n",
    }
    graph = on_disk(tmp_path, files)  # without the file itself: it is being written
    context = planner.plan(graph, ROOM, path=path, text=text)
    assert names(context) == list(imported)
    ((other, body),) = imported.items()
    comment = "#" if language == "Python" else "//"
    assert text_of(planner, context) == f"{comment}{other}\n{body}\n"


def test_the_text_that_is_written_counts_not_the_one_on_disk(
    tmp_path: Path, planner: ContextPlanner
) -> None:
    graph = on_disk(tmp_path, {"a.py": "import b\n", "b.py": "x = 1\n", "c.py": "y = 1\n"})
    assert names(planner.plan(graph, ROOM, path="a.py", text="import c\n")) == ["c.py"]
    assert names(planner.plan(graph, ROOM, path="a.py", text="")) == []
    # A text of its own is not given: the file is one of those that are shown, as it is.
    assert names(planner.plan(graph, ROOM, path="a.py")) == ["b.py", "a.py"]


def test_secrets_binaries_and_ignored_files_are_never_shown(
    tmp_path: Path, planner: ContextPlanner
) -> None:
    root = write_files(
        tmp_path,
        {
            ".gitignore": "private/\n",
            ".env": "TOKEN = 'hidden'\n",
            "id_rsa.py": "k = 'hidden'\n",
            "credentials.json": '{"k": "hidden"}\n',
            "keys.py": "k = '-----BEGIN RSA PRIVATE " + "KEY-----'\n",
            "private/p.py": "p = 'hidden'\n",
            "node_modules/n.py": "n = 'hidden'\n",
            "fine.py": "f = 1\n",
        },
    )
    (root / "blob.py").write_bytes(b"b = 'hidden'\0\n")
    (root / "link.py").symlink_to(root / ".env")
    (root / ".git").mkdir()
    graph = RepoIndex(root).graph()
    assert list(graph.sources) == ["fine.py"]
    live = "import keys, blob, link, id_rsa, fine\nfrom private import p\nimport credentials\n"
    assert names(planner.plan(graph, ROOM, path="a.py", text=live)) == ["fine.py"]
    assert graph.skipped["secret"] == 4
    assert graph.skipped["binary"] == 1


def test_nearest_first_then_what_most_files_import(planner: ContextPlanner) -> None:
    texts = {name: f"{name} = '{'x' * 60}'\n" for name in ("near", "far", "used", "user", "u2")}
    needs = {
        "main": {"near", "used"},
        "near": {"far"},
        "user": {"main", "used"},
        "u2": {"used"},  # shares a helper with main, no more
    }
    graph = graph_of({**texts, "main": "m\n"}, needs)
    one = len(planner._tokenizer.encode(f"#near\n{texts['near']}\n", add_bos=False))
    own = len(planner._tokenizer.encode("#main\nm\n\n", add_bos=False))
    expected = ["used", "near", "far", "user"]
    for n in range(1, 5):
        context = planner.plan(graph, own + n * (one + 4), path="main")
        assert {*names(context)} == {"main", *expected[:n]}
    assert {*names(planner.plan(graph, ROOM, path="main"))} == {"main", *expected}


def test_a_file_too_long_is_cut_at_a_lines_end_and_said_so(planner: ContextPlanner) -> None:
    long = "".join(f"line_{i} = {i}\n" for i in range(100))
    graph = graph_of({"a": "", "long": long, "deep": "z = 1\n"}, {"a": {"long"}, "long": {"deep"}})
    context = planner.plan(graph, 200, path="a")
    shown = text_of(planner, context)
    assert shown.startswith("#long\nline_0 = 0\n")
    assert shown.endswith("#a\n\n\n")
    beginning = shown.removeprefix("#long\n").partition("#a")[0]
    assert long.startswith(beginning)
    report = context.report()
    assert report["cut_files"] == ["long"]
    assert report["dropped_files"] == ["deep"]
    assert report["tokens"] <= 200


def test_cycles(planner: ContextPlanner) -> None:
    graph = graph_of(dict.fromkeys("abcd", "x\n"), {"a": {"b"}, "b": {"c"}, "c": {"a", "b"}})
    assert sorted(names(planner.plan(graph, ROOM, path="a"))) == ["a", "b", "c"]


def test_without_a_path_the_most_imported_come_first(planner: ContextPlanner) -> None:
    texts = dict.fromkeys(("a", "b", "base"), "x = '" + "y" * 50 + "'\n")
    graph = graph_of(texts, {"a": {"base"}, "b": {"base"}})
    room = len(planner._tokenizer.encode(f"#base\n{texts['base']}\n", add_bos=False))
    assert names(planner.plan(graph, room)) == ["base"]
    assert names(planner.plan(graph, ROOM)) == ["base", "a", "b"]


FILES = "abcdefgh"


@given(
    pairs=st.sets(st.tuples(st.sampled_from(FILES), st.sampled_from(FILES)), max_size=20),
    lengths=st.lists(st.integers(1, 40), min_size=8, max_size=8),
    room=st.integers(0, 600),
)
def test_any_graph_any_room(
    planner: ContextPlanner, pairs: set[tuple[str, str]], lengths: list[int], room: int
) -> None:
    """It fits; every part begins its file; without cycles what is needed stands before."""
    acyclic = {(a, b) for a, b in pairs if a > b}
    texts = {name: f"v_{name} = 1\n" * n for name, n in zip(FILES, lengths, strict=True)}
    for edges, ordered in ((acyclic, True), (pairs, False)):
        needs = {name: {b for a, b in edges if a == name and b != name} for name in FILES}
        graph = graph_of(texts, needs)
        for path in ("h", None):
            context = planner.plan(graph, room, path=path)
            assert context.n_tokens <= room
            place = {name: i for i, name in enumerate(names(context))}
            assert len(place) == len(context.parts)
            for part in context.parts:
                shown = planner._tokenizer.decode(part.ids)
                assert f"#{part.path}\n{texts[part.path]}\n".startswith(shown)
                assert part.cut or shown == f"#{part.path}\n{texts[part.path]}\n"
            if ordered:
                assert all(place[b] < place[a] for a, b in edges if {a, b} <= set(place))
            assert not set(place) & set(context.left_out)


def test_the_index_sees_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsq.runtime.repo.index.LEAST_SECONDS", -1.0)
    monkeypatch.setattr("dsq.runtime.repo.index.SHARE", 0)
    index = RepoIndex(write_files(tmp_path, {"a.py": "import b\n", "b.py": "x = 1\n"}))

    def looked_again() -> RepoGraph:
        index.graph()  # starts to look, and answers at once
        with index._lock:  # it has looked
            return index._graph

    before = index.graph()
    assert looked_again() is before  # nothing changed
    write_files(tmp_path, {"b.py": "x = 'longer'\n", "c.py": "y = 1\n"})
    after = looked_again()
    assert after.sources["b.py"].text == "x = 'longer'\n"
    assert set(after.sources) == {"a.py", "b.py", "c.py"}
    (tmp_path / "b.py").unlink()
    gone = looked_again()
    assert set(gone.sources) == {"a.py", "c.py"}
    assert gone.sources["a.py"].needs == frozenset()
    for name in ("a.py", "c.py"):
        (tmp_path / name).unlink()
    assert looked_again() is gone  # an empty folder is no reason to fail


def test_a_folder_without_source(tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="no source files"):
        RepoIndex(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        RepoIndex(tmp_path / "none")


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x.py", "a/../../x.py", "..", ".", "a\nb.py", "a\0b", "x" * 2000]
)
def test_paths_that_lead_out_are_refused(path: str) -> None:
    with pytest.raises(InputError, match="no file's path inside the repository"):
        inner_path(path)


def test_paths_inside_are_made_plain() -> None:
    assert inner_path("./src//a.py") == os.path.normpath("src/a.py")
    assert inner_path("src\\b\\a.py") == "src/b/a.py"
