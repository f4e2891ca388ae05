"""`dsq complete --repo`: what stands before the prompt, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsq.cli.main import main
from tests.cli.test_main import fails
from tests.runtime.corpus.conftest import write_files
from tests.tiny_gguf import write_tiny_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("m") / "tiny.gguf")


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    files = {"src/main.py": "from src import util\nx = ", "src/util.py": "y = 1\n", "z.py": "z\n"}
    return write_files(tmp_path / "repo", files)


def report(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["complete", *map(str, args), "-n", "2", "-t", "1", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_file_goes_on_behind_what_it_imports(
    model: Path, repo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report(capsys, model, "--repo", repo, "--file", "src/main.py")
    assert found["dsq"]["repo"]["files"] == ["src/util.py"]
    alone = report(capsys, model, "--prefix-file", repo / "src/main.py")
    assert "dsq" not in alone
    heading = len("#src/main.py\n")
    grown = found["prompt_tokens"] - alone["prompt_tokens"]
    assert found["dsq"]["repo"]["tokens"] < grown <= found["dsq"]["repo"]["tokens"] + heading


def test_the_file_is_known_by_its_prefix_file_or_by_its_name(
    model: Path, repo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inferred = report(capsys, model, "--repo", repo, "--prefix-file", repo / "src/main.py")
    assert inferred["dsq"]["repo"]["files"] == ["src/util.py"]
    new = report(capsys, model, "--repo", repo, "--file", "new.py", "-p", "import z\n")
    assert new["dsq"]["repo"]["files"] == ["z.py"]
    monkeypatch.chdir(repo / "src")
    here = report(capsys, model, "--repo", "..", "--file", "main.py", "--suffix", "\n")
    assert here["dsq"]["repo"]["files"] == ["src/util.py"]
    none = report(capsys, model, "--repo", repo, "-p", "def f")
    assert set(none["dsq"]["repo"]["files"]) == {"src/util.py", "src/main.py", "z.py"}


def test_it_says_what_stands_before_the_prompt(
    model: Path, repo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(repo, {"src/util.py": "line = 1\n" * 200})
    args = ["complete", str(model), "--repo", str(repo), "--file", "src/main.py", "-n", "2"]
    assert main([*args, "-c", "300"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("from src import util\nx = ")
    assert "of the repository repo: src/util.py (its beginning)" in err


def test_what_is_refused(model: Path, repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "goes with --repo" in fails(capsys, "complete", model, "--file", "a.py")
    assert "there is nothing to complete" in fails(capsys, "complete", model, "--repo", repo)
    assert "is not inside" in fails(capsys, "complete", model, "--repo", repo, "--file", "../a.py")
    assert "cannot read it" in fails(capsys, "complete", model, "--repo", repo, "--file", "a.py")
    empty = repo / "empty"
    empty.mkdir()
    assert "no source files" in fails(capsys, "complete", model, "--repo", empty, "-p", "x")
