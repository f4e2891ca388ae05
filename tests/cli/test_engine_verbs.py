"""eval, complete and chat on tiny-coder: the promised JSON, the right tokens, the right stops."""

from __future__ import annotations

import json

import pytest

from dsq.cli.main import main
from tests.models import TINY_CODER

HELDOUT = TINY_CODER / "heldout.txt"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    for preset in ("bf16", "q4_0", "q8_0"):
        main(["quantize", preset, str(TINY_CODER), "-o", str(folder / f"{preset}.gguf")])
    return folder


def run_json(capsys, *args):
    capsys.readouterr()
    assert main([*map(str, args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSQ_CACHE", str(tmp_path / "cache"))


def test_eval_has_the_promised_keys(files, capsys):
    args = ("--ref", files / "bf16.gguf", "--text", HELDOUT, "--chunks", "2")
    report = run_json(capsys, "eval", files / "q4_0.gguf", *args)
    promised = (
        "ppl ppl_stderr kld_mean kld_median kld_p99 kld_p999 kld_max "
        "top1_agreement rms_dp tokens size_bytes bpw tokens_per_second"
    ).split()
    assert set(promised) <= set(report)
    assert report["size_bytes"] == (files / "q4_0.gguf").stat().st_size
    assert 0 < report["top1_agreement"] <= 1
    assert 0 <= report["rms_dp"] <= 1


def test_more_bits_drift_less(files, capsys):
    args = ("--ref", files / "bf16.gguf", "--text", HELDOUT, "--chunks", "4")
    kld = {
        name: run_json(capsys, "eval", files / f"{name}.gguf", *args)["kld_mean"]
        for name in ("bf16", "q8_0", "q4_0")
    }
    assert abs(kld["bf16"]) < 1e-4
    assert kld["bf16"] < kld["q8_0"] < 0.1 * kld["q4_0"]


def test_eval_without_a_text_measures_code_that_every_machine_has(files, capsys):
    report = run_json(capsys, "eval", files / "q8_0.gguf", "--chunks", "1")
    assert report["text"][0].endswith(".py")


def test_a_text_too_short_says_how_many_tokens_are_needed(files, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("x = 1\n")
    assert main(["eval", str(files / "q8_0.gguf"), "--text", str(tmp_path / "short.txt")]) == 2
    assert "512" in capsys.readouterr().err


def test_complete_is_repeatable_when_greedy(files, capsys):
    args = ("complete", files / "bf16.gguf", "-p", "import os\nimport ", "-n", "12")
    first = run_json(capsys, *args)
    assert {"text", "tokens", "stop_reason", "tokens_per_second"} <= set(first)
    assert first["stop_reason"] in ("eos", "length")
    assert run_json(capsys, *args)["text"] == first["text"]


def test_complete_streams_the_prompt_and_the_answer(files, capsys):
    capsys.readouterr()
    assert main(["complete", str(files / "bf16.gguf"), "-p", "import os\n", "-n", "5"]) == 0
    assert capsys.readouterr().out.startswith("import os\n")


def test_fill_in_the_middle_reads_files(files, tmp_path, capsys):
    (tmp_path / "f").write_text("def add(a, b):\n    return ")
    (tmp_path / "g").write_text("\n\nprint(add(1, 2))\n")
    args = ("--prefix-file", tmp_path / "f", "--suffix-file", tmp_path / "g", "-n", "16")
    report = run_json(capsys, "complete", files / "bf16.gguf", *args)
    assert report["prompt_tokens"] > 10


def test_a_prompt_longer_than_the_context_is_refused(files, capsys):
    args = ["complete", str(files / "bf16.gguf"), "-p", "x = 1\n" * 100, "-c", "64"]
    assert main(args) == 2
    assert "64" in capsys.readouterr().err


def test_the_gpu_flag_on_a_cpu_build_is_an_error(files, capsys):
    import llama_cpp

    if llama_cpp.llama_supports_gpu_offload():
        pytest.fail("this build has a GPU backend; the CPU build is what the tests install")
    assert main(["complete", str(files / "bf16.gguf"), "-p", "x", "-ngl", "4"]) == 2
    assert "CMAKE_ARGS" in capsys.readouterr().err


def test_chat_needs_a_template(files, capsys):
    assert main(["chat", str(files / "bf16.gguf"), "-p", "hello"]) == 2
    assert "template" in capsys.readouterr().err


@pytest.mark.torch
def test_a_hugging_face_directory_is_measured_in_float32(files, capsys):
    args = ("--text", HELDOUT, "--chunks", "1", "--no-cache")
    hf = run_json(capsys, "eval", TINY_CODER, *args)
    gguf = run_json(capsys, "eval", files / "bf16.gguf", "--ref", TINY_CODER, *args)
    assert abs(hf["ppl"] - gguf["ppl"]) < 0.02 * hf["ppl"]
    assert gguf["kld_mean"] < 2e-3
