"""Plain conversions killed half-way: the next run of the same output clears up after them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsq.cli.main import main
from tests.models import TINY_CODER
from tests.runtime.dying import die

_CODE = "from dsq.cli.main import main\nmain(command)"
SLAB = "dsq.convert.gguf.writer:start_writeback"


@pytest.mark.parametrize(
    ("command", "where", "name"),
    [
        (["quantize", "q4_0"], SLAB, "m.gguf"),
        (["quantize", "q4_0", "--split-max-size", "1M"], SLAB, "m-00001-of-00004.gguf"),
        (["convert", "--to", "gguf"], SLAB, "m.gguf"),
        (["convert", "--to", "hf"], "dsq.convert.hf.writer:start_writeback", "m.gguf"),
    ],
    ids=["quantize", "shards", "convert", "directory"],
)
def test_killed_and_run_again(tmp_path: Path, command: list[str], where: str, name: str) -> None:
    source = TINY_CODER
    if "hf" in command:
        source = tmp_path / "source.gguf"
        assert main(["convert", str(TINY_CODER), "-o", str(source)]) == 0
    whole, out = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, out):
        folder.mkdir()
    assert main([*command, str(source), "-o", str(whole / "m.gguf")]) == 0
    again = [*command, str(source), "-o", str(out / "m.gguf")]
    die(_CODE, where, 2, command=again)
    left = [path.name for path in out.iterdir()]
    assert left
    assert all(found.startswith(".m") and found.endswith(".tmp") for found in left)
    assert main(again) == 0
    assert contents(out) == contents(whole)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
