"""`dsq verify` from the command line: exit codes, lines, JSON, receipt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dsq.cli.main import main
from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.pipeline import plan_gguf, run_gguf_plan
from dsq.quant.presets import preset
from tests.models import llama_config, write_hf
from tests.runtime.damage import rewrite

CHECKS = [
    "tensors",
    "hyperparameters",
    "rope",
    "token_ids",
    "tokenizer_parity",
    "chat_template",
    "logits_short",
    "logits_long",
    "runs",
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An artifact and its source."""
    folder = tmp_path_factory.mktemp("verify")
    source = write_hf(folder / "model", llama_config())
    checkpoint = open_checkpoint(source)
    run_gguf_plan(checkpoint, plan_gguf(checkpoint, preset("q4_k_m")), folder / "a.gguf")
    return folder / "a.gguf", source


@pytest.fixture
def artifact(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copy(pair[0], tmp_path / "a.gguf"))


def test_right(artifact: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(artifact), "--source", str(pair[1])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [["✓", name] for name in CHECKS]
    receipt = artifact.with_name("a.gguf.receipt.json")
    assert lines[-1].endswith(f"is its source ({pair[1]}); receipt: {receipt.resolve()}")
    assert json.loads(receipt.read_text())["ok"] is True


def test_json(artifact: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    receipt = artifact.with_name("here.json")
    args = ["verify", str(artifact), "--source", str(pair[1]), "--no-logits", "--json"]
    assert main([*args, "--receipt", str(receipt), "-t", "1"]) == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert captured.err == ""
    assert printed["ok"] is True
    assert printed["receipt"] == str(receipt)
    asked = {c["name"]: c["ok"] for c in printed["checks"]}
    assert asked == dict.fromkeys(CHECKS[:6], True) | dict.fromkeys(CHECKS[6:])
    assert json.loads(receipt.read_text())["options"] == {"logits": False, "threads": 1}


def test_wrong(artifact: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, the reason in its line, and a receipt that says so."""
    wrong = rewrite(
        artifact,
        artifact.with_name("wrong.gguf"),
        metadata={"llama.rope.scaling.type": None, "llama.rope.scaling.factor": None},
    )
    assert main(["verify", str(wrong), "--source", str(pair[1])]) == 1
    lines = capsys.readouterr().out.splitlines()
    marks = {line.split()[1]: line.split()[0] for line in lines[:-1]}
    assert {name for name, mark in marks.items() if mark == "✗"} == {
        "rope",
        "logits_short",
        "logits_long",
    }
    (rope,) = [line for line in lines if line.startswith("✗ rope ")]
    assert rope.endswith("factor is 1, the source says linear 4")
    assert "is NOT its source" in lines[-1]
    assert json.loads(wrong.with_name("wrong.gguf.receipt.json").read_text())["ok"] is False


def test_damaged_and_missing(
    artifact: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    artifact.write_bytes(artifact.read_bytes()[:5000])
    assert main(["verify", str(artifact), "--source", str(pair[1])]) == 2
    assert main(["verify", "nowhere.gguf", "--source", str(pair[1])]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert errors[0].startswith(f"dsq: error: {artifact}: ")
    assert "nowhere.gguf" in errors[1]
    assert list(artifact.parent.glob("*.receipt.json")) == []


def test_a_receipt_that_cannot_be_written(
    artifact: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = artifact.with_name("missing") / "r.json"
    args = ["verify", str(artifact), "--source", str(pair[1]), "--no-logits"]
    assert main([*args, "--receipt", str(nowhere)]) == 2
    assert "give --receipt PATH" in capsys.readouterr().err
