"""Each rule of DeepSeek Coder's filter, with the least text that breaks it."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest

from dsq.runtime.corpus import licences
from dsq.runtime.corpus.duplicates import NearDuplicates
from dsq.runtime.corpus.quality import fault, tongue
from dsq.runtime.corpus.troff import plain
from tests.models import ROOT
from tests.runtime.corpus.conftest import python_module

GOOD = {
    "Python": "def f(x):\n    return x + 1\n",
    "JavaScript": "const f = async (x) => await x?.y;\n",
    "TypeScript": "const f = (x: number): string => `${x}`;\n",
    "TSX": "const f = (p: P) => <div>{p.x}</div>;\n",
    "Java": "class A { int f() { return 1; } }\n",
    "Go": "package a\n\nfunc f() int { return 1 }\n",
    "C": "int f(void) { return 1; }\n",
    "C++": "template <class T> T f(T x) { return x; }\n",
    "Rust": "fn f<'a>(x: &'a str) -> &'a str { x }\n",
}
HTML = "<html><body>{}</body></html>\n"


@pytest.mark.parametrize("language", GOOD)
def test_syntax_errors_are_found_and_good_code_passes(language):
    assert fault(language, GOOD[language]) is None
    broken = GOOD[language].replace("f", "f ((", 1)
    assert fault(language, broken) == "syntax error"


def test_macros_are_no_syntax_errors_in_c():
    text = "".join(f"int function_{i}(int a) {{ return a + {i}; }}\n" for i in range(40))
    assert fault("C", text + "FOREACH(x, list) BEGIN_ BLOCK\n") is None


@pytest.mark.parametrize(
    ("language", "good", "bad", "reason"),
    [
        ("Python", "# " + "word " * 19 + "\n", "# " + "word " * 20 + "\n", "average line"),
        ("Python", "#" + "x" * 999 + "\n" * 40, "#" + "x" * 1000 + "\n" * 40, "line over 1000"),
        ("Python", "abc = 12345\n", "a = 1234567\n", "under 25% alphabetic"),
        ("Shell", "echo hello\n", '<?xml version="1.0"?>\n<hello/>\n', "XML"),
        ("HTML", HTML.format("<p>word</p>\n" * 30), HTML.format("word " * 5), "visible"),
        ("HTML", HTML.format("<p>word</p>\n" * 30),
         HTML.format("<script>\n" + "let word;\n" * 90 + "</script>" + "<p>word</p>\n" * 30),
         "visible"),
        ("JSON", '{"name": "a name that is long enough", "other": ""}\n', '{"name": 1}\n', "JSON"),
        ("YAML", "key: value\n" * 5, "key: value\n" * 500, "YAML"),
    ],
)  # fmt: skip
def test_each_rule(language, good, bad, reason):
    assert fault(language, good) is None
    assert reason in fault(language, bad)


def test_xslt_may_begin_as_xml():
    assert fault("XSLT", '<?xml version="1.0"?>\n<xsl:stylesheet name="transform"/>\n') is None


ENGLISH = "This is the manual of a tool that turns the files in a folder into one file. " * 3
CHINESE = "这个工具把一个文件夹里的文件变成一个文件，选项 --help 会显示帮助。" * 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ENGLISH, "english"),
        (CHINESE, "chinese"),
        ("Ce manuel décrit un outil qui transforme les fichiers d'un dossier. " * 4, None),
        ("このツールはフォルダーの中のファイルを一つのファイルに変換します。" * 6, None),
        ("for (i = 0; i < count; i++) total[i] = index[i] + value[i];\n" * 9, None),
        ("Too short.", None),
    ],
)
def test_the_tongue_of_a_text(text, expected):
    assert tongue(text) == expected


# Near-duplicates


def test_a_copy_with_a_renamed_variable_is_a_near_duplicate():
    near = NearDuplicates()
    text = "".join(python_module(i) for i in range(10))
    renamed = text.replace("alpha", "first_letter", 40)
    assert near.find_or_add("original", text) is None
    assert near.find_or_add("copy", renamed) == "original"
    assert near.find_or_add("other", "".join(python_module(i) for i in range(10, 20))) is None


def test_the_threshold_is_the_jaccard_similarity_of_shingles():
    """What MinHash estimates with 256 permutations (standard error 0.03), counted exactly."""
    base = [f"word{i}" for i in range(2000)]
    for shared, expected in ((1900, True), (1200, False)):
        other = base[:shared] + [f"other{i}" for i in range(2000 - shared)]
        sets = [{tuple(t[i : i + 5]) for i in range(len(t) - 4)} for t in (base, other)]
        jaccard = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        assert (jaccard > 0.7) is expected
        near = NearDuplicates()
        near.find_or_add("base", " ".join(base))
        assert (near.find_or_add("other", " ".join(other)) == "base") is expected


# Licences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# SPDX-License-Identifier: Apache-2.0 OR MIT\nimport os\n", "Apache-2.0 OR MIT"),
        ("/* SPDX-License-Identifier: GPL-2.0-only */\n", "GPL-2.0-only"),
        ("// Permission is hereby granted,\n// free of charge\n", None),
        ("Permission is hereby\n granted, free of charge, to any", "MIT"),
        ("x = 1\n", None),
    ],
)
def test_a_licence_by_its_words(text, expected):
    assert licences.of_text(text) == expected


def test_a_repositorys_licence():
    assert licences.of_folder(ROOT) == "MIT"
    assert licences.of_folder(ROOT / "models" / "tiny-coder") == "PSF-2.0"
    assert "BSD" in licences.of_repository(Path(numpy.__file__).resolve().parent)


# Manual pages


def test_a_manual_page_loses_its_markup():
    page = r""".\" A comment
.de Sh
.B junk
..
.TH LS 1
.SH NAME
ls \- list directory contents
.SH "SEE ALSO"
.BR dir (1),
.B \-\-all
do not hide entries starting with \fI.\fP \(aqx\(aq \(bu
.TP
\fB\-a\fR
.IP "\(bu" 2
it\(cqs a \*(lqbackslash\*(rq: \e
"""
    assert plain(page) == (
        "NAME\nls - list directory contents\n\nSEE ALSO\ndir(1),\n--all\n"
        "do not hide entries starting with . 'x' •\n\n-a\n\n•\nit's a backslash: \\\n"
    )
    assert plain(".so man1/other.1\n") == ""
    assert plain(".Dd May 1, 2020\n.Nm tool\n") == ""
