"""`dsq quantize --method compensated` from the command line: what is refused, what is reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dsq.cli.main import main
from dsq.convert.gguf.reader import read_gguf
from dsq.runtime.calibration.workdir import WorkDir
from tests.models import ROOT, llama_config, write_hf
from tests.runtime.changed import changed
from tests.runtime.dying import die

pytestmark = pytest.mark.torch

TEXT = ROOT / "runtime" / "decoder.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("model") / "model")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either --stats FILE (of dsq calibrate), or --calibrate with --text"),
        (["--calibrate", "--stats", "s"], "give either --stats FILE"),
        (["--calibrate"], "which text? give --text FILE…"),
        (["--stats", "s", "--ctx", "64"], "--ctx: --stats holds its tokens; leave it out"),
        (["--calibrate", "--text", TEXT, "--imatrix", "i"], "--imatrix: the statistics hold"),
        (["--stats", "none"], "none: cannot read the statistics"),
        (["--calibrate", "--text", TEXT, "--damp", "-1"], "-1 is no number from 0 to 100"),
        (["--calibrate", "--text", TEXT, "--ctx", "4096"], "but one window needs 4096"),
    ],
)
def test_a_muddle_is_refused(flags, message, model, tmp_path, capsys) -> None:
    out = tmp_path / "out.gguf"
    command = ["quantize", "q4_0", str(model), "-o", str(out), "--method", "compensated"]
    assert main([*command, *map(str, flags)]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [["--calibrate"], ["--stats", "s"], ["--damp", "0.1"]])
def test_flags_of_the_method_need_the_method(flags, model, capsys) -> None:
    assert main(["quantize", "q4_0", str(model), *flags]) == 2
    assert f"{flags[0]}: only with --method compensated" in capsys.readouterr().err


def test_calibrating_now_or_before_gives_the_same_tensors(model, tmp_path, capsys) -> None:
    options = ["--tokens", "512", "--seed", "3", "-t", "1"]
    now, before = tmp_path / "now.gguf", tmp_path / "before.gguf"
    stats = tmp_path / "stats"
    quantize = ["quantize", "q4_k_m", str(model), "--method", "compensated", "-t", "1", "--json"]
    assert main([*quantize, "-o", str(now), "--calibrate", *options, "--ctx", "128",
                 "--damp", "0.2", "--text", str(TEXT)]) == 0  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    assert report["compensation"]["tokens"] == 512
    tensors = report["compensation"]["tensors"]
    assert len(tensors) == 14
    assert {t["damp"] for t in tensors} == {0.2}
    assert all(0 < t["error"] < 1 for t in tensors)

    calibrate = ["calibrate", str(model), "-o", str(stats), "-c", "128", "--json"]
    assert main([*calibrate, *options, "--text", str(TEXT)]) == 0
    assert main([*quantize, "-o", str(before), "--stats", str(stats), "--damp", "0.2"]) == 0
    sizes = {path: path.stat().st_size for path in (now, before)}
    data = {p: p.read_bytes()[-report["size_bytes"] // 2 :] for p in sizes}
    assert data[now] == data[before]
    for path in sizes:
        metadata = read_gguf(path).metadata
        assert {key: value for key, value in metadata.items() if "quantize." in key} == {
            "dsq.quantize.method": "compensated",
            "dsq.quantize.dataset": "decoder.py",
            "dsq.quantize.tokens": 512,
        }
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_types_are_those_chosen_with_an_importance_matrix(tmp_path, capsys) -> None:
    """q4_0 has q4_1 in it then; what llama-quantize chooses is held in test_type_choice."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8}
    model = write_hf(tmp_path / "model", llama_config(**small))
    stats = tmp_path / "stats"
    text = ["--text", str(TEXT), "--tokens", "512"]
    assert main(["calibrate", str(model), "-o", str(stats), "-c", "128", *text]) == 0

    def types(*flags: str) -> dict[str, str]:
        capsys.readouterr()
        assert main(["quantize", "q4_0", str(model), "--dry-run", "--json", *flags]) == 0
        return {t["name"]: t["type"] for t in json.loads(capsys.readouterr().out)["tensors"]}

    with_imatrix = types("--imatrix", str(stats))
    assert types() != with_imatrix
    assert types("--method", "compensated", "--calibrate", "--ctx", "128", *text) == with_imatrix
    assert types("--method", "compensated", "--stats", str(stats)) == with_imatrix


def test_statistics_of_another_model_are_refused(model, tmp_path, capsys) -> None:
    stats, other = tmp_path / "stats", write_hf(tmp_path / "other", seed=1)
    calibrate = ["calibrate", str(other), "-o", str(stats), "-c", "128", "--tokens", "512"]
    assert main([*calibrate, "--text", str(TEXT)]) == 0
    command = ["quantize", "q4_0", str(model), "--method", "compensated", "--stats", str(stats)]
    assert main([*command, "-o", str(tmp_path / "out.gguf")]) == 2
    assert "statistics of another model" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"stats", "other"}


def test_killed_and_run_again(model, tmp_path, capsys) -> None:
    """With distillation after it: the quantized file is not made again."""
    text = ["--calibrate", "--ctx", "64", "--tokens", "512", "--text", str(TEXT), "-t", "1"]
    command = ["quantize", "q4_0", str(model), "--method", "compensated", "--distill", "512"]
    code = "from dsq.cli.main import main\nmain(command)"
    whole, out = tmp_path / "whole.gguf", tmp_path / "out.gguf"
    assert main([*command, *text, "-o", str(whole)]) == 0
    command += [*text, "-o", str(out)]
    for where in (
        "dsq.runtime.fidelity.two_ways:TwoWays.leave",
        "dsq.runtime.fidelity.distill:distill",
        "dsq.runtime.calibration.workdir:WorkDir.finish",
    ):
        die(code, where, 1, command=command)
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["compensation"]["resumed_layers"] == 0  # killed in the first
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "whole.gguf"]


def test_an_unfinished_distillation_is_not_mixed_with_another(
    model, tmp_path, capsys, monkeypatch
) -> None:
    """Not with one of other weights either, be they in the last row."""

    def interrupted(*args: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dsq.runtime.fidelity.distill.distill", interrupted)
    source = tmp_path / "source"
    shutil.copytree(model, source)
    command = ["quantize", "q4_0", str(source), "-o", str(tmp_path / "out.gguf"), "--distill"]
    text = ["--calibrate", "--ctx", "64", "--tokens", "512", "--text", str(TEXT), "-t", "1"]
    assert main([*command, "512", *text]) == 130
    assert main([*command, "448", *text]) == 2
    changed(model, source, "model.layers.1.mlp.up_proj.weight", 0.5)
    assert main([*command, "512", *text]) == 2
    refused = "out.gguf.partial holds an unfinished run with other settings"
    assert capsys.readouterr().err.count(refused) == 2
    with WorkDir(tmp_path / "b.gguf", ""):
        assert main([*command[:-2], str(tmp_path / "b.gguf"), "--distill", "512", *text]) == 2
    assert "b.gguf is being written by another run" in capsys.readouterr().err


def test_a_dry_run_calibrates_nothing(model, tmp_path, capsys) -> None:
    command = ["quantize", "iq3_xxs", str(model), "--method", "compensated", "--dry-run"]
    assert main([*command, "--calibrate", "--tokens", "512", "--text", str(TEXT)]) == 0
    assert "would write" in capsys.readouterr().out
