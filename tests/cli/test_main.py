"""The command line: exit codes, one-line errors, JSON alone on standard output."""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys

import pytest

from dsq.cli.main import VERBS, main
from tests.models import ROOT, TINY_CODER, write_hf
from tests.tiny_gguf import write_tiny_gguf


def dsq(*args, cwd=None):
    """Run as a user would, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "dsq.cli.main", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
    )


def fails(capsys, *args):
    """Exit 2, one line on standard error, nothing on standard output; returns the line."""
    capsys.readouterr()
    assert main(list(map(str, args))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dsq: error: ")
    assert err.count("\n") == 1
    return err


def test_help_names_every_verb(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_an_example_in_its_help(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    assert f"example:\n  dsq {verb} " in capsys.readouterr().out


def test_an_unknown_verb_lists_the_verbs(capsys):
    assert "quantize" in fails(capsys, "quantise")


def test_a_missing_model_says_what_to_give(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no model in this folder" in fails(capsys, "inspect")


def test_the_one_model_in_the_folder_is_the_default(tmp_path, monkeypatch, capsys):
    write_hf(tmp_path / "coder")
    monkeypatch.chdir(tmp_path)
    assert main(["quantize", "q8_0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["output"] == "coder-Q8_0.gguf"
    assert "2 models in this folder" in fails(capsys, "inspect")


def test_convert_inspect_and_back(tmp_path, capsys):
    gguf, back = tmp_path / "tiny.gguf", tmp_path / "back"
    assert main(["convert", str(TINY_CODER), "--to", "gguf", "-o", str(gguf), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["type"] == "bf16"
    assert report["size_bytes"] == gguf.stat().st_size
    assert main(["convert", str(gguf), "--to", "hf", "-o", str(back), "--json"]) == 0
    capsys.readouterr()
    reports = []
    for model in (TINY_CODER, gguf, back):
        assert main(["inspect", str(model), "-c", "4096", "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    keys = ("architecture", "n_params", "rope", "n_ctx")
    assert len({json.dumps([r[k] for k in keys]) for r in reports}) == 1
    assert reports[1]["rope"] == {"freq_base": 100000.0, "kind": "linear", "factor": 4.0}
    assert reports[1]["tokenizer"]["pre"] == "deepseek-coder"
    assert reports[1]["memory_at_ctx"]["n_ctx"] == 4096


def test_inspect_json_has_the_promised_keys(capsys):
    assert main(["inspect", str(TINY_CODER), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    promised = (
        "format architecture n_params rope n_ctx tokenizer tensors_by_type "
        "size_bytes bpw memory_at_ctx"
    ).split()
    assert set(promised) <= set(report)
    tokenizer = ["kind", "pre", "n_tokens", "bos", "eos", "eot", "fim", "add_bos"]
    assert set(tokenizer) <= set(report["tokenizer"])
    assert set(report["tokenizer"]["fim"]) == {"prefix", "suffix", "middle"}


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["quantize", "q4_k_m", str(TINY_CODER), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "blk.0.attn_v.weight" in out
    assert "q4_k" in out
    assert list(tmp_path.iterdir()) == []


def test_an_output_is_not_replaced_unasked(tmp_path, capsys):
    out = tmp_path / "m.gguf"
    out.write_text("precious")
    assert "--force" in fails(capsys, "convert", TINY_CODER, "-o", out)
    assert out.read_text() == "precious"
    assert main(["convert", str(TINY_CODER), "-o", str(out), "--force"]) == 0


def test_an_unknown_type_lists_the_types(capsys):
    assert "q4_k_m" in fails(capsys, "quantize", "q4_z", TINY_CODER)


def test_a_quantized_file_is_not_quantized_again(tmp_path, capsys):
    q8 = tmp_path / "q8.gguf"
    assert main(["quantize", "q8_0", str(TINY_CODER), "-o", str(q8)]) == 0
    capsys.readouterr()
    assert "--allow-requantize" in fails(capsys, "quantize", "q4_0", q8, "-o", tmp_path / "q4.gguf")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"vocab_size": 100}, "100"),
    ],
)
def test_what_is_unsupported_is_named(tmp_path, capsys, change, word):
    source = write_hf(tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **change}))
    assert word in fails(capsys, "convert", source, "-o", tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_read_only_folder_and_a_missing_one(tmp_path, capsys):
    assert "is not a folder" in fails(capsys, "convert", TINY_CODER, "-o", tmp_path / "no" / "m")


def test_quiet_when_not_a_terminal(tmp_path):
    done = dsq("quantize", "q8_0", TINY_CODER, "-o", tmp_path / "m.gguf", "--json")
    assert done.returncode == 0
    assert done.stderr == ""
    json.loads(done.stdout)


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m dsq.cli.main inspect {TINY_CODER} | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert "Traceback" not in done.stderr


ORDERS = {  # positionals, options
    "convert": (["a"], ["-o", "x"]),
    "calibrate": (["a"], ["-o", "x"]),
    "imatrix merge": (["a", "b"], ["-o", "x"]),
    "quantize": (["q4_0", "a"], ["-o", "x", "--force"]),
    "eval": (["a"], ["--ref", "x"]),
    "inspect": (["a"], ["-c", "16"]),
    "verify": (["a"], ["--source", "x"]),
    "tokenize": (["a", "text"], ["--no-bos"]),
    "tokenizer check": (["a"], ["--fuzz", "3"]),
    "doctor": (["a"], ["--fix", "x"]),
    "complete": (["a"], ["-p", "x"]),
    "chat": (["a"], ["-p", "x"]),
    "report": (["a", "b"], ["--ref", "x"]),
    "fit": (["a"], ["-c", "16"]),
    "devices": ([], ["--json"]),
    "package": (["a"], ["--to", "ollama", "-o", "x"]),
    "serve": (["a"], ["--port", "8081"]),
}


def test_the_orders_are_of_every_verb():
    assert {command.split()[0] for command in ORDERS} == set(VERBS)


@pytest.mark.parametrize("command", ORDERS)
def test_options_may_stand_before_between_and_after(command, monkeypatch, capsys):
    verb, *action = command.split()
    seen = []
    module = importlib.import_module(f"dsq.cli.{verb}")
    monkeypatch.setattr(module, "run", lambda args: seen.append(vars(args)) or 0)
    positionals, options = ORDERS[command]
    for i in range(len(positionals) + 1):
        assert main([verb, *action, *positionals[:i], *options, *positionals[i:]]) == 0
    assert all(args == seen[0] for args in seen)
    assert "--typo" in fails(capsys, verb, *action, *positionals, *options, "--typo")


def test_what_follows_two_dashes_is_no_option(capsys):
    assert main(["tokenize", str(TINY_CODER), "--json", "--no-bos", "--", "-x"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "-x"


def test_an_empty_output_name_is_told(capsys):
    assert "-o/--output: the file's name is empty" in fails(
        capsys, "quantize", "q8_0", TINY_CODER, "-o", ""
    )


def through_shell(redirection, *args):
    command = f'"$@" {redirection}'
    return subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, "-m", "dsq.cli.main", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.parametrize("verb", [("--help",), ("inspect",), ("tokenize", "-")])
def test_closed_standard_output_is_one_line(verb):
    done = through_shell(">&-", verb[0], TINY_CODER, *verb[1:])
    assert done.returncode == 1
    assert done.stderr.startswith("dsq: error: standard output is closed")
    assert done.stderr.count("\n") == 1


def test_closed_standard_error_spoils_no_output(tmp_path):
    done = through_shell("2>&-", "inspect", TINY_CODER, "--json")
    assert done.returncode == 0
    json.loads(done.stdout)
    done = through_shell("2>&-", "inspect", tmp_path / "none")
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize("verb", ["inspect", "tokenize", "tokenize --lines", "--help"])
def test_an_output_that_cannot_be_written_is_a_failure(tmp_path, verb):
    """The limit of a file's size, as a full disk's stand-in."""
    lines = tmp_path / "lines"
    lines.write_text('"def"\n')
    args = {
        "inspect": ["inspect", TINY_CODER],
        "tokenize": ["tokenize", TINY_CODER, "def"],
        "tokenize --lines": ["tokenize", TINY_CODER, "--lines", lines],
        "--help": ["quantize", "--help"],
    }[verb]
    with open(tmp_path / "out", "wb") as out:
        done = subprocess.run(
            [sys.executable, "-B", "-m", "dsq.cli.main", *map(str, args)],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
        )
    assert done.returncode == 1
    assert done.stderr == "dsq: error: cannot write the output: File too large\n"


def test_a_pipe_is_no_model(tmp_path, capsys):
    pipe = tmp_path / "m.gguf"
    os.mkfifo(pipe)
    for verb in (["doctor", pipe], ["complete", pipe, "-p", "x"]):
        assert "is a pipe" in fails(capsys, *verb)


def test_a_vocabulary_alone_is_told(tmp_path, capsys):
    import gguf

    whole, vocabulary = tmp_path / "whole.gguf", tmp_path / "vocab.gguf"
    write_tiny_gguf(whole)
    writer = gguf.GGUFWriter(vocabulary, "llama")
    for name, field in gguf.GGUFReader(whole).fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            is_array = field.types[0] == gguf.GGUFValueType.ARRAY
            kind = field.types[-1] if is_array else None
            writer.add_key_value(name, field.contents(), field.types[0], kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert main(["tokenize", str(vocabulary), "x"]) == 0
    for verb in (["inspect", vocabulary], ["complete", vocabulary, "-p", "x"]):
        assert "holds a vocabulary only (no tensors)" in fails(capsys, *verb)


def test_a_directory_without_weights_names_what_is_looked_for(tmp_path, capsys):
    source = write_hf(tmp_path / "hf")
    (source / "model.safetensors").unlink()
    assert "expected model.safetensors or pytorch_model.bin" in fails(capsys, "inspect", source)
