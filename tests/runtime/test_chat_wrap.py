"""Breaking an answer between words."""

from __future__ import annotations

import textwrap

from hypothesis import given
from hypothesis import strategies as st

from dsq.runtime.chat_wrap import Wrapper, columns


def wrapped(pieces: list[str], width: int) -> str:
    wrapper = Wrapper(width)
    return "".join([*map(wrapper.push, pieces), wrapper.finish()])


WORDS = st.lists(st.text("abcdef.,", min_size=1, max_size=9), min_size=1, max_size=40)


@given(words=WORDS, width=st.integers(12, 40), cut=st.integers(1, 7))
def test_prose_breaks_where_textwrap_breaks_it(words: list[str], width: int, cut: int) -> None:
    text = " ".join(words)
    pieces = [text[i : i + cut] for i in range(0, len(text), cut)]
    assert wrapped(pieces, width).split("\n") == textwrap.wrap(text, width)


@given(text=st.text("ab `|\n漢é", max_size=60), width=st.integers(0, 20))
def test_nothing_changes_but_spaces_to_line_breaks(text: str, width: int) -> None:
    found = wrapped(list(text), width)
    assert "".join(found.split()) == "".join(text.split())
    assert found.count("\n") >= text.count("\n")


def test_code_and_tables_keep_their_lines() -> None:
    long = "x = " + "a b " * 20
    code = f"```python\n{long}\n```\n"
    table = "| a | " + "b " * 40 + "|\n"
    assert wrapped([code, table], 20) == code + table
    after = wrapped([code, "one two three four five six"], 20)
    assert after == code + "one two three four\nfive six"


def test_chinese_does_not_wait_for_a_space() -> None:
    wrapper = Wrapper(10)
    assert wrapper.push("漢字") == "漢字"
    assert columns("漢字a") == 5
