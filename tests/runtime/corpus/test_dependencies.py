"""Which file needs which, in every language, and Algorithm 1."""

from __future__ import annotations

import graphlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsq.runtime.corpus.code import path_index
from dsq.runtime.repo.dependencies import dependency_order
from dsq.runtime.repo.languages import language_of, refine
from dsq.runtime.repo.syntax import imports
from tests.runtime.corpus.conftest import write_files


def edges(root, files):
    """{file: the files it needs}, for a repository of these files."""
    write_files(root, files)
    sources = [path for path in files if language_of(path)]
    index = path_index(root, sources)
    found = {}
    for path in sources:
        language = refine(language_of(path), path, files[path])
        names = imports(language, files[path])
        found[path] = {other for name in names for other in index.resolve(language, path, name)}
    return found


PYTHON = {
    "pkg/__init__.py": "from pkg.core import run\n",
    "pkg/core.py": "import os\nfrom . import util\nfrom .sub import deep as d, other\n",
    "pkg/util.py": "import pkg.sub.deep\nimport json\n",
    "pkg/json.py": "x = 1\n",  # not what `import json` inside a package means
    "pkg/sub/__init__.py": "other = 1\n",
    "pkg/sub/deep.py": "from ..util import (\n    helper as h,\n)\n",
    "scripts/run.py": "import helper\nimport pkg.core as core\n",
    "scripts/helper.py": '"""import pkg"""\n# import pkg.util\ns = "import pkg.core"\n',
}
JAVASCRIPT = {
    "src/main.ts": (
        'import { a } from "./lib/a.js";\nimport type { T } from "./types";\nimport "react";\n'
    ),
    "src/lib/a.ts": 'export * from "./b";\nconst s = "./never";\n',
    "src/lib/b.tsx": 'import x = require("../old");\nexport const B = () => <div/>;\n',
    "src/old.cjs": 'const c = require("./lib");\nasync () => import(`./x${c}`);\n',
    "src/lib/index.js": 'const m = await import("../main");\n',
    "src/types.d.ts": "export type T = number;\n",
}
JAVA = {
    "src/main/java/org/acme/App.java": (
        "package org.acme;\nimport org.acme.util.Text;\nimport static org.acme.util.Maths.square;\n"
        "import java.util.List;\nclass App { Config c; List<String> l; }\n"
    ),
    "src/main/java/org/acme/Config.java": (
        "package org.acme;\nimport org.acme.util.*;\nclass Config {}\n"
    ),
    "src/main/java/org/acme/util/Text.java": (
        "package org.acme.util;\nclass Text { int i = Maths.square(2); }\n"
    ),
    "src/main/java/org/acme/util/Maths.java": "package org.acme.util;\nclass Maths {}\n",
}
GO = {
    "go.mod": "module example.org/tool\n\ngo 1.22\n",
    "main.go": 'package main\nimport (\n\t"fmt"\n\tu "example.org/tool/internal/util"\n)\n',
    "internal/util/a.go": 'package util\nimport "example.org/tool/errors"\n',
    "internal/util/b.go": "package util\n",
    "internal/util/b_test.go": "package util\n",
    "errors/errors.go": 'package errors\nimport "github.com/pkg/errors"\n',
}
C = {
    "src/main.c": '#include <stdio.h>\n#include "list.h"\n#include "core/mem.h"\n',
    "src/list.c": '#include "list.h"\n',
    "include/list.h": '#include "core/mem.h"\nstruct list;\n',
    "include/core/mem.h": "#pragma once\n",
    "src/core/mem.cpp": '#include "mem.h"\n',
    "src/core/mem.h": "namespace core {}\n",
}
RUST = {
    "src/main.rs": "mod net;\nmod config;\nuse std::fmt;\nuse config::Config;\nfn main() {}\n",
    "src/net/mod.rs": (
        "pub mod tcp;\nuse crate::config::{Config, load};\nmod tests { use super::*; }\n"
    ),
    "src/net/tcp.rs": "use super::Socket;\nuse crate::{config as c, net::{self, udp::Packet}};\n",
    "src/net/udp.rs": "use serde::Serialize;\n",
    "src/config.rs": "pub struct Config;\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (PYTHON, {
            "pkg/__init__.py": {"pkg/core.py"},
            "pkg/core.py": {"pkg/util.py", "pkg/sub/deep.py", "pkg/sub/__init__.py"},
            "pkg/util.py": {"pkg/sub/deep.py"},
            "pkg/sub/deep.py": {"pkg/util.py"},
            "scripts/run.py": {"scripts/helper.py", "pkg/core.py"},
        }),
        (JAVASCRIPT, {
            "src/main.ts": {"src/lib/a.ts", "src/types.d.ts"},
            "src/lib/a.ts": {"src/lib/b.tsx"},
            "src/lib/b.tsx": {"src/old.cjs"},
            "src/old.cjs": {"src/lib/index.js"},
            "src/lib/index.js": {"src/main.ts"},
        }),
        (JAVA, {
            "src/main/java/org/acme/App.java": {
                "src/main/java/org/acme/util/Text.java",
                "src/main/java/org/acme/util/Maths.java",
                "src/main/java/org/acme/Config.java",
            },
            "src/main/java/org/acme/Config.java": {
                "src/main/java/org/acme/util/Text.java",
                "src/main/java/org/acme/util/Maths.java",
            },
            "src/main/java/org/acme/util/Text.java": {"src/main/java/org/acme/util/Maths.java"},
        }),
        (GO, {
            "main.go": {"internal/util/a.go", "internal/util/b.go"},
            "internal/util/a.go": {"errors/errors.go"},
        }),
        (C, {
            "src/main.c": {"include/list.h", "src/core/mem.h"},
            "src/list.c": {"include/list.h"},
            "include/list.h": {"include/core/mem.h"},
            "src/core/mem.cpp": {"src/core/mem.h"},
        }),
        (RUST, {
            "src/main.rs": {"src/net/mod.rs", "src/config.rs"},
            "src/net/mod.rs": {"src/net/tcp.rs", "src/config.rs"},
            "src/net/tcp.rs": {"src/net/mod.rs", "src/net/udp.rs", "src/config.rs"},
        }),
    ],
    ids=("python", "javascript", "java", "go", "c", "rust"),
)  # fmt: skip
def test_imports_become_edges(tmp_path, files, expected):
    found = {path: needs for path, needs in edges(tmp_path, files).items() if needs}
    assert found == expected


@pytest.mark.parametrize("files", [PYTHON, JAVASCRIPT, JAVA, GO, C, RUST])
def test_the_order_holds_every_file_once_also_in_cycles(tmp_path, files):
    needs = edges(tmp_path, files)
    order = [path for part in dependency_order(needs) for path in part]
    assert sorted(order) == sorted(needs)


def test_what_is_needed_comes_first(tmp_path):
    """The order in which DeepSeek Coder's README shows its example: utils, model, main."""
    files = {
        "main.py": "from utils import load_data\nfrom model import IrisClassifier as Classifier\n",
        "model.py": "import torch\nfrom utils import load_data\n",
        "utils.py": "import torch\n",
        "alone.py": "x = 1\n",
    }
    assert dependency_order(edges(tmp_path, files)) == [
        ["alone.py"],
        ["utils.py", "model.py", "main.py"],
    ]


def test_unfinished_code_still_tells_its_imports():
    assert imports("Python", "from a import b\nimport c\ndef f(:\n    x = (1,\n") == ["a.b", "c"]
    assert imports("JavaScript", 'import x from "./x";\nfunction f( {\n') == ["./x"]


def algorithm_1(needs):
    """The paper's listing, as it stands; ties by name, where the paper leaves them open."""
    files = sorted(needs)
    graph = {file: [] for file in files}
    in_degree = dict.fromkeys(files, 0)
    for a in files:
        for b in files:
            if a != b and b in needs[a]:
                graph[b].append(a)
                in_degree[a] += 1
    near = {f: {*graph[f], *(b for b in files if f in graph[b])} for f in files}
    results, placed = [], set()
    for first in files:
        part = {first}
        while grown := set().union(*(near[f] for f in part)) - part:
            part |= grown
        if first in placed:
            continue
        placed |= part
        result = []
        while len(result) != len(part):
            file = min((f for f in part if f not in result), key=lambda f: (in_degree[f], f))
            for node in graph[file]:
                in_degree[node] -= 1
            result.append(file)
        results.append(result)
    return results


graphs = st.integers(1, 9).flatmap(
    lambda n: st.lists(
        st.sets(st.integers(0, n - 1).map(lambda i: f"f{i}")), min_size=n, max_size=n
    )
)


@given(graphs)
def test_the_order_is_that_of_algorithm_1(needs):
    named = {f"f{i}": needed for i, needed in enumerate(needs)}
    assert dependency_order(named) == algorithm_1(named)


@given(graphs)
def test_without_cycles_the_order_is_topological(needs):
    named = {f"f{i}": {n for n in needed if n < f"f{i}"} for i, needed in enumerate(needs)}
    sorter = graphlib.TopologicalSorter(named)
    sorter.prepare()  # raises CycleError if there is one
    place = {f: i for i, f in enumerate(f for part in dependency_order(named) for f in part)}
    assert all(place[n] < place[file] for file, needed in named.items() for n in needed)
