"""`dsq calibrate --repo` and `--mix`: what is calibrated on, and what the statistics say of it."""

from __future__ import annotations

import json
import random

import pytest

from dsq.cli.main import main
from tests.cli.test_main import fails
from tests.models import TINY_CODER
from tests.runtime.corpus.conftest import NAMES, python_module, write_files

OPTIONS = ("--tokens", "2k", "--ctx", "128", "--threads", "1", "--json")


@pytest.fixture
def repo(tmp_path):
    files = {f"pkg/m{i}.py": python_module(i) for i in range(6)}
    return write_files(
        tmp_path / "repo", {**files, ".env": "KEY=1\n", "pkg/broken.py": "def f(:\n"}
    )


def calibrate(capsys, *args):
    assert main(["calibrate", *map(str, args), *OPTIONS]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.torch
def test_a_repository_is_calibrated_on_and_recorded(tmp_path, repo, capsys):
    # --repo takes all it can get, the model as well.
    report = calibrate(capsys, "-o", tmp_path / "stats.safetensors", "--repo", repo, TINY_CODER)
    assert (report["n_windows"], report["n_ctx"]) == (16, 128)
    text = report["record"]["text"]
    assert text["name"] == str(repo)
    assert text["kind"] == "repo"
    assert text["parts"]["code"]["sources"][str(repo)]["languages"].keys() == {"Python"}
    assert text["dropped"] == {"secret": 1, "syntax error": 1}
    assert text["fim"]["documents"] > 0


@pytest.mark.torch
def test_the_mix_takes_what_is_named(tmp_path, repo, capsys):
    rng = random.Random(0)
    english, chinese = tmp_path / "english.txt", tmp_path / "chinese.txt"
    english.write_text("\n".join(" ".join(rng.choices(NAMES, k=9)) for _ in range(200)))
    chinese.write_text("这个工具把一个文件夹里的文件变成一个文件，选项会显示帮助。" * 20)
    named = ("--repo", repo, "--english", english, "--chinese", chinese, "--fim-rate", "0")
    out = tmp_path / "stats.safetensors"
    text = calibrate(capsys, TINY_CODER, "-o", out, "--mix", "code", "--strict", *named)["record"][
        "text"
    ]
    assert text["warnings"] == []
    assert text["fim"]["documents"] == 0
    shares = {name: part["share"] for name, part in text["parts"].items()}
    assert shares == pytest.approx({"code": 0.87, "english": 0.10, "chinese": 0.03}, abs=0.001)
    assert list(text["parts"]["chinese"]["sources"]) == ["--chinese"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "give --text FILE…, --repo DIR… or --mix code"),
        (("--text", "a.py", "--repo", "r"), "--text: add --mix code"),
        (("--repo", "r", "--chinese", "zh.txt"), "--chinese: add --mix code"),
        (("--text", "a.py", "--strict", "--fim-rate", "0"), "--strict, --fim-rate: add --mix code"),
        (("--repo", "nowhere"), "nowhere: no such folder"),
        (("--repo", ".", "--fim-rate", "2"), "the FIM rate is 2.0"),
        (("--repo", ".", "--ctx", "99999"), "--ctx 99999: the model was trained on"),
    ],
)  # fmt: skip
def test_a_muddle_is_an_error(tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    assert words in fails(capsys, "calibrate", TINY_CODER, *args)
