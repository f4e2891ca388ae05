"""llama-perplexity's windows."""

from __future__ import annotations

import pytest

from dsq.errors import InputError
from dsq.runtime.windows import cut, join


def test_windows_by_hand() -> None:
    windows = cut(list(range(100, 121)), 8, bos=1)
    assert windows.ids.tolist() == [
        [1, 101, 102, 103, 104, 105, 106, 107],
        [1, 109, 110, 111, 112, 113, 114, 115],
    ]
    assert windows.first == 4  # position 4 predicts 105, position 6 predicts 107
    assert windows.targets.tolist() == [[105, 106, 107], [113, 114, 115]]
    assert windows.scored == 3
    assert len(windows) == 2


def test_without_bos_every_token_stays() -> None:
    assert cut(list(range(8)), 8, bos=None).ids.tolist() == [list(range(8))]


def test_an_odd_window() -> None:
    windows = cut(list(range(7)), 7, bos=None)
    assert windows.first == 3
    assert windows.targets.tolist() == [[4, 5, 6]]


def test_chunks_limit_the_windows() -> None:
    assert len(cut(list(range(64)), 8, bos=None, chunks=3)) == 3
    assert len(cut(list(range(64)), 8, bos=None, chunks=99)) == 8


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(InputError, match="text has 7 tokens, but one window needs 8"):
        cut(list(range(7)), 8, bos=None)
    with pytest.raises(InputError, match="chunks is 0"):
        cut(list(range(8)), 8, bos=None, chunks=0)
    with pytest.raises(InputError, match="n_ctx is 3"):
        cut(list(range(8)), 3, bos=None)


def test_texts_are_joined_as_files_are_read() -> None:
    assert join(["a\n\n", "b\n"]) == "a\n\nb"
    assert join(["a"]) == "a"
