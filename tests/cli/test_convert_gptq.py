"""`dsq convert --to gptq`: what its options do, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsq.cli.main import main
from tests.models import TINY_CODER, llama_config, write_hf

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
TEXT = TINY_CODER / "heldout.txt"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = llama_config(**SMALL, num_key_value_heads=1)
    return write_hf(tmp_path_factory.mktemp("small") / "model", config)


@pytest.mark.torch
def test_a_directory_from_text(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "out"
    command = ["convert", "--to", "gptq", "--group-size", "32", "--act-order", "--static-groups"]
    command += ["--distill", "256"]
    command += ["--bits", "3", "--asym", "--format", "gptq_v2", "--dynamic", ".*o_proj=8:64"]
    command += ["--dynamic", ".*k_proj=none", "--tokens", "256", "--ctx", "64", "-t", "1"]
    command += ["-o", str(out), "--json", "--text", str(TEXT), str(small)]  # SRC comes last
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["n_tokens"] == 256
    assert report["rope"] == "linear, factor 4, base 100000"
    assert report["text"]["name"] == "heldout.txt"
    assert report["distillation"]["kld_after"] <= report["distillation"]["kld_before"]
    tuned = [report["distillation"][f"n_{part}_tokens"] for part in ("train", "held_out")]
    assert sum(tuned) == 256
    assert report["size_bytes"] == sum(file.stat().st_size for file in out.iterdir())
    assert {(t["bits"], t["group_size"]) for t in report["tensors"]} == {(3, 32), (8, 64)}
    config = json.loads((out / "quantize_config.json").read_text())
    assert config["dynamic"] == {"+:.*o_proj": {"bits": 8, "group_size": 64}, "-:.*k_proj": {}}
    assert (config["checkpoint_format"], config["sym"]) == ("gptq_v2", False)
    assert (config["desc_act"], config["static_groups"]) == (True, True)
    assert main(command) == 2
    assert "exists; give another output, or --force" in capsys.readouterr().err


def test_a_plan_is_printed(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(small), "--to", "gptq", "--group-size", "32", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["model.layers.1.mlp.up_proj.qweight", "I32"] for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "gptq"], "groups of 128 do not divide its 64 inputs"),
        (["--to", "gptq", "--group-size", "32"], "calibrated on text: give --text FILE"),
        (["--to", "gptq", "--static-groups"], "--static-groups: only with --act-order"),
        (["--distill", "4k"], "--distill: only with --to gptq"),
        (["--to", "gptq", "--bpw", "4"], "--bpw: only with --to exl2"),
        (["--to", "gptq", "--outtype", "f16"], "--outtype f16: --to gptq keeps"),
        (["--to", "gptq", "--split-max-size", "1G"], "--split-max-size: only with --to gguf"),
        (["--to", "gptq", "--dither", "0.5"], "--dither goes with --to hf"),
        (["--bits", "4", "--asym"], "--bits, --asym: only with --to gptq"),
        (["--tokens", "4k"], "--tokens: only with --to gptq or --to exl2"),
        (["--to", "gptq", "--dynamic", "q_proj=5"], "'q_proj=5'; write REGEX=bits"),
        (["--to", "gptq", "--dynamic", "(=4"], "'(' is no regular expression"),
        (["--to", "gptq", "--dynamic", "q=4", "--group-size", "32"], "--dynamic q: no matrix"),
    ],
)
def test_refusals(
    small: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    try:
        code = main(["convert", str(small), *options, "-o", "/nowhere/out"])
    except SystemExit as stopped:  # argparse's own
        code = int(stopped.code or 0)
    assert code == 2
    assert message in capsys.readouterr().err
