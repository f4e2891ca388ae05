"""calibrate and imatrix on the command line."""

from __future__ import annotations

import argparse
import json

import pytest

from dsq.cli import calibrate
from dsq.cli.main import main
from dsq.quant.stats import read_stats
from tests.convert.test_byte_identity import assert_same_tensors
from tests.models import TINY_CODER

pytestmark = pytest.mark.torch
HELDOUT = TINY_CODER / "heldout.txt"
SMALL = ("--ctx", "64", "--tokens", "512", "-t", "1")


@pytest.fixture(scope="module")
def stats(tmp_path_factory):
    out = tmp_path_factory.mktemp("stats") / "stats.safetensors"
    assert main(["calibrate", str(TINY_CODER), "--text", str(HELDOUT), "-o", str(out), *SMALL]) == 0
    return out


def run_json(capsys, *args):
    capsys.readouterr()
    assert main([*map(str, args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_report_and_record(tmp_path, capsys):
    out = tmp_path / "s.safetensors"
    extra = ("--hessians", "--gradients", "--gradient-tokens", "128")
    # the model last, as a glob of texts would leave it
    texts = ("--text", HELDOUT, TINY_CODER)
    report = run_json(capsys, "calibrate", "-o", out, *SMALL, *extra, *texts)
    assert report["n_tokens"] == 512
    assert report["n_gradient_tokens"] == 128
    assert report["size_bytes"] == out.stat().st_size
    assert report["resumed_steps"] == 0
    stats = read_stats(out)
    assert stats.has_hessians
    assert stats.gradients
    file = stats.record["text"]["files"][0]
    assert file["name"] == "heldout.txt"
    assert file["n_chars"] == len(HELDOUT.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty; leave it out"),
        (b"abc\0def", "binary (a NUL at character 3)"),
        (b"caf\xe9", "not UTF-8 at byte 3"),
        (b"too short", "one window needs 2048; give a longer text"),
    ],
)
def test_text_that_is_no_text(tmp_path, capsys, content, message):
    path = tmp_path / "text"
    path.write_bytes(content)
    out = str(tmp_path / "s")
    assert main(["calibrate", str(TINY_CODER), "--text", str(path), "-o", out]) == 2
    assert message in capsys.readouterr().err


def test_no_text_is_hidden_in_the_code(tmp_path, capsys):
    assert main(["calibrate", str(TINY_CODER), "-o", str(tmp_path / "s")]) == 2
    assert "give --text" in capsys.readouterr().err


def test_a_shorter_text_than_asked_for_is_told(tmp_path, capsys):
    path = tmp_path / "text"
    path.write_text(HELDOUT.read_text(encoding="utf-8")[:2000])
    args = ["calibrate", str(TINY_CODER), "--text", str(path), "-o", str(tmp_path / "s")]
    assert main([*args, "-c", "64", "-t", "1"]) == 0
    assert "tokens of the 131,072 asked for" in capsys.readouterr().err


def test_numbers_of_tokens():
    assert calibrate.count("128k") == 131072
    assert calibrate.count("1M") == 1 << 20
    assert calibrate.count("500") == 500
    for text in ("", "0", "k", "1.5k", "-3", "9" * 30):
        with pytest.raises(argparse.ArgumentTypeError, match="no number of tokens"):
            calibrate.count(text)


def test_make_merge_show(stats, tmp_path, capsys):
    made, merged = tmp_path / "a.gguf", tmp_path / "b.gguf"
    assert main(["imatrix", "make", str(stats), "-o", str(made)]) == 0
    assert main(["imatrix", "merge", str(made), str(stats), "-o", str(merged)]) == 0
    one, two = (run_json(capsys, "imatrix", "show", path) for path in (made, merged))
    assert (one["chunk_count"], two["chunk_count"]) == (8, 16)
    assert two["datasets"] == ["heldout.txt", "heldout.txt"]
    assert len(one["tensors"]) == 28
    assert two["tensors"][0]["count"] == 2 * one["tensors"][0]["count"] == 1024
    assert two["tensors"][0]["total"] == pytest.approx(one["tensors"][0]["total"])
    assert main(["imatrix", "show", str(stats)]) == 0
    assert "blk.0.attn_q.weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("show", "STATS", "STATS"), "takes one file, not 2"),
        (("show", "STATS", "-o", "x"), "-o is for dsq imatrix make and merge"),
        (("merge", "STATS", "--process-output"), "--process-output is for"),
        (("make", str(HELDOUT)), "no statistics file, or damaged"),
        (("show", str(HELDOUT)), "neither an imatrix GGUF nor statistics"),
        (("show", "missing"), "No such file"),
        (("make", "STATS", "-o", "STATS"), "exists; give another output"),
    ],
)
def test_imatrix_refuses(stats, capsys, args, message):
    args = [str(stats) if arg == "STATS" else arg for arg in args]
    assert main(["imatrix", *args]) == 2
    assert message in capsys.readouterr().err


def test_quantize_takes_the_statistics(stats, tmp_path):
    made = tmp_path / "i.gguf"
    assert main(["imatrix", "make", str(stats), "-o", str(made)]) == 0
    files = []
    for imatrix in (made, stats):
        out = tmp_path / f"{imatrix.name}.q4_0.gguf"
        args = ["quantize", "q4_0", str(TINY_CODER), "--imatrix", str(imatrix), "-o", str(out)]
        assert main(args) == 0
        files.append(out)
    assert_same_tensors(*files)
