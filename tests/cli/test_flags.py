"""The flags of convert and quantize reach what they are meant for."""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer

from dsq.cli import common
from dsq.cli.main import main
from dsq.convert.gguf.reader import read_gguf
from dsq.quant import ggml
from dsq.quant.scheme import BF16
from tests.cli.test_main import fails
from tests.models import TINY_CODER, llama_config, random_weights, write_hf, write_safetensors


def quantize(tmp_path, preset, *flags, source=TINY_CODER):
    out = tmp_path / "out.gguf"
    assert main(["quantize", preset, str(source), "-o", str(out), "--force", *map(str, flags)]) == 0
    return read_gguf(out)


def types(gguf):
    return {name: tensor.type.name for name, tensor in gguf.tensors.items()}


def test_pure_and_leave_output_tensor(tmp_path):
    pure = types(quantize(tmp_path, "q4_k_m", "--pure"))
    assert {t for n, t in pure.items() if not n.endswith("norm.weight")} == {"q4_k"}
    kept = types(quantize(tmp_path, "q4_k_m", "--leave-output-tensor"))
    assert kept["output.weight"] == "bf16"
    assert kept["blk.0.attn_q.weight"] == "q4_k"


def test_types_of_single_tensors(tmp_path):
    flags = ("--tensor-type", "ffn_down=q8_0", "--tensor-type", r"blk\.0\.attn_.*=q6_k")
    more = ("--output-tensor-type", "q5_0", "--token-embedding-type", "q5_1")
    got = types(quantize(tmp_path, "q4_0", *flags, *more))
    assert got["blk.3.ffn_down.weight"] == "q8_0"
    assert got["blk.0.attn_k.weight"] == "q6_k"
    assert got["blk.1.attn_k.weight"] == "q4_0"
    assert got["output.weight"] == "q5_0"
    assert got["token_embd.weight"] == "q5_1"


def test_llama_cpps_numbers_and_aliases(tmp_path):
    assert types(quantize(tmp_path, "7")) == types(quantize(tmp_path, "Q8_0"))
    assert types(quantize(tmp_path, "q4_k")) == types(quantize(tmp_path, "q4_k_m"))


def test_copy_changes_no_type(tmp_path):
    source = tmp_path / "q4.gguf"
    main(["quantize", "q4_k_m", str(TINY_CODER), "-o", str(source)])
    copied = quantize(tmp_path, "copy", source=source)
    assert types(copied) == types(read_gguf(source))
    assert copied.metadata["general.file_type"] == 15


@pytest.mark.parametrize("bad", ["i8", "q8_k", "f64", "q9"])
def test_types_that_no_weight_can_have_are_refused(capsys, bad):
    assert bad in fails(capsys, "quantize", "q8_0", TINY_CODER, "--token-embedding-type", bad)


def test_an_embedding_type_that_needs_an_imatrix_is_refused(capsys, tmp_path):
    args = ("quantize", "q8_0", TINY_CODER, "--token-embedding-type", "iq2_xxs")
    line = fails(capsys, *args, "-o", tmp_path / "x.gguf")
    assert "token_embd.weight (iq2_xxs)" in line
    assert list(tmp_path.iterdir()) == []


def test_an_imatrix_file_changes_the_bytes_and_is_recorded(tmp_path):
    plain = quantize(tmp_path, "q4_0")
    before = plain.data("blk.0.attn_q.weight").copy()
    entries = []
    rng = np.random.default_rng(0)
    for tensor in plain.tensors.values():
        if len(tensor.shape) == 2:
            name = tensor.name.encode()
            values = rng.random(tensor.n_per_row).astype("<f4")
            header = np.array([1, values.size], "<i4").tobytes()
            entries.append(
                np.array([len(name)], "<i4").tobytes() + name + header + values.tobytes()
            )
    path = tmp_path / "imatrix.dat"
    path.write_bytes(np.array([len(entries)], "<i4").tobytes() + b"".join(entries))
    guided = quantize(tmp_path, "q4_0", "--imatrix", path)
    assert (guided.data("blk.0.attn_q.weight") != before).any()
    assert guided.metadata["quantize.imatrix.file"] == str(path)
    assert guided.metadata["quantize.imatrix.entries_count"] == len(entries)


def test_shards_by_flag(tmp_path, capsys):
    capsys.readouterr()
    args = ["convert", str(TINY_CODER), "-o", str(tmp_path / "m.gguf"), "--split-max-size", "3M"]
    assert main([*args, "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert len(files) > 2
    assert files[0].endswith(f"-00001-of-{len(files):05d}.gguf")
    assert "less than 1M" in fails(capsys, *args[:-1], "10")


def test_nonfinite_weights_by_flag(tmp_path, capsys):
    config = llama_config()
    source = write_hf(tmp_path / "hf", config)
    weights = random_weights(config)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    write_safetensors(source / "model.safetensors", weights, "BF16")
    out = tmp_path / "m.gguf"
    assert "blk.1.ffn_up.weight: 1 weights are NaN" in fails(capsys, "convert", source, "-o", out)
    assert not out.exists()
    assert main(["convert", str(source), "-o", str(out), "--allow-nonfinite"]) == 0
    values = ggml.dequantize(read_gguf(out).data("blk.1.ffn_up.weight"), BF16, 256)
    assert np.isnan(values).sum() == 1


def test_a_gguf_without_a_pre_tokenizer_can_be_mended(tmp_path, capsys):
    """The files of 2023: nothing says which pre-tokenizer, and the tokens come out wrong."""
    import gguf

    old = tmp_path / "old.gguf"
    whole = tmp_path / "whole.gguf"
    main(["convert", str(TINY_CODER), "-o", str(whole)])
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(old, "llama")
    left_out = ("tokenizer.ggml.pre", "tokenizer.huggingface.json", "general.architecture")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in left_out:
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert main(["inspect", str(old)]) == 0
    assert "pre-tokenizer default" in capsys.readouterr().out
    assert "--pre" in fails(capsys, "convert", old, "--to", "hf", "-o", tmp_path / "no")
    new = tmp_path / "new.gguf"
    args = ["quantize", "q8_0", str(old), "-o", str(new), "--pre", "deepseek-coder"]
    assert main(args) == 0
    assert read_gguf(new).metadata["tokenizer.ggml.pre"] == "deepseek-coder"
    back = ["convert", str(old), "--to", "hf", "-o", str(tmp_path / "hf")]
    assert main([*back, "--pre", "deepseek-coder"]) == 0
    text = "def f(x):\r\n    return x + 12  # größer 中文\n"
    mended = Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json")).encode(text).ids
    assert mended[1:] == Tokenizer.from_file(str(TINY_CODER / "tokenizer.json")).encode(text).ids


def test_force_deletes_nothing_of_the_users(tmp_path, capsys):
    project = tmp_path / "project"
    project.mkdir()
    main(["convert", str(TINY_CODER), "-o", str(project / "m.gguf")])
    (project / "notes.txt").write_text("mine")
    args = ("convert", project / "m.gguf", "--to", "hf", "--force", "-o")
    assert "holds the source" in fails(capsys, *args, project)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    assert "notes.txt" in fails(capsys, *args, other)
    assert sorted(p.name for p in project.iterdir()) == ["m.gguf", "notes.txt"]


def test_a_read_only_folder_is_refused_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the tests may run as root
    assert "read-only" in fails(capsys, "convert", TINY_CODER, "-o", tmp_path / "m.gguf")


def test_flags_that_do_not_apply_are_refused(tmp_path, capsys):
    assert "--to hf" in fails(capsys, "convert", TINY_CODER, "--dither", "0.3")
    gguf = tmp_path / "k.gguf"
    main(["quantize", "q4_k_m", str(TINY_CODER), "-o", str(gguf)])
    args = ("convert", gguf, "--to", "hf", "-o", tmp_path / "hf")
    assert "step is not known" in fails(capsys, *args, "--dither", "0.3")
    assert "--to gguf" in fails(capsys, *args, "--split-max-size", "1G")


def test_a_wrong_flag_is_one_line(capsys):
    assert "--help" in fails(capsys, "quantize", "q4_0", "--no-such-flag")


def test_an_instruct_models_eos_survives_the_way_back(tmp_path, capsys):
    source = tmp_path / "instruct"
    shutil.copytree(TINY_CODER, source)
    ids = {"bos_token_id": 4109, "eos_token_id": 4117}
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["eos_token"]["content"] = "<|EOT|>"
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("config.json", "generation_config.json"):
        content = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps({**content, **ids}))
    gguf, back = tmp_path / "m.gguf", tmp_path / "back"
    assert main(["convert", str(source), "-o", str(gguf)]) == 0
    assert main(["convert", str(gguf), "--to", "hf", "-o", str(back)]) == 0
    assert json.loads((back / "generation_config.json").read_text())["eos_token_id"] == 4117


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("4G", 4 << 30), ("500M", 500 << 20), ("3.5GiB", 7 << 29), ("2mb", 2 << 20)],
)
def test_sizes(text, n_bytes):
    assert common.size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "4X", "1e9"])
def test_what_is_no_size(text):
    with pytest.raises(argparse.ArgumentTypeError):
        common.size(text)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("deepseek-coder-1.3b-base", "deepseek-coder-1.3b-base-Q4_0.gguf"),
        ("m-bf16.gguf", "m-Q4_0.gguf"),
        ("m.Q4_K_M.gguf", "m-Q4_0.gguf"),
        ("m-f16-00001-of-00003.gguf", "m-Q4_0.gguf"),
        ("models--org--coder/snapshots/0123abcd", "coder-Q4_0.gguf"),
    ],
)
def test_output_names(tmp_path, source, name):
    path = tmp_path / source
    if path.suffix == ".gguf":
        path.touch()
    else:
        path.mkdir(parents=True)
    assert str(common.output_path(path, "q4_0")) == name


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path):
    """The kernel refuses the file beyond 1 MiB, as a full disk would."""

    def small_files_only():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    done = subprocess.run(
        [sys.executable, "-m", "dsq.cli.main", "convert", TINY_CODER, "-o", tmp_path / "m.gguf"],
        preexec_fn=small_files_only,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "m.gguf: the file system cannot hold" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_receipt_replaces_nothing_but_a_receipt(tmp_path, capsys):
    out = tmp_path / "m.gguf"
    main(["quantize", "q8_0", str(TINY_CODER), "-o", str(out)])
    before = out.read_bytes()
    args = ("verify", out, "--source", TINY_CODER, "--no-logits")
    assert "is no receipt" in fails(capsys, *args, "--receipt", out)
    assert out.read_bytes() == before
    again = [*map(str, args), "--receipt", str(tmp_path / "r.json")]
    assert main(again) == main(again) == 0


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("-t", "100000"), "512"),
        (("-c", "99999999999"), "16777216"),
        (("-n", "99999999999999"), "16777216"),
        (("--temp", "inf"), "temp"),
        (("--prefix-file", "-", "--suffix-file", "-"), "only once"),
    ],
)
def test_absurd_numbers_are_refused(flags, word, capsys):
    prompt = () if "--prefix-file" in flags else ("-p", "x")
    assert word in fails(capsys, "complete", TINY_CODER, *prompt, *flags)


def test_a_pattern_that_matches_no_tensor_is_a_typo(tmp_path, capsys):
    args = ("quantize", "q4_0", TINY_CODER, "-o", tmp_path / "m.gguf")
    assert "no tensor matches" in fails(capsys, *args, "--tensor-type", "nosuch=q8_0")


def test_sigterm_leaves_no_temporary_file(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from dsq.convert import pipeline\n"
        "from dsq.cli.main import main\n"
        "write = pipeline.write_gguf\n"
        "def stopped(path, layout, slabs, progress):\n"
        "    told = lambda n: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return write(path, layout, slabs, told)\n"
        "pipeline.write_gguf = stopped\n"
        f"sys.exit(main(['convert', {str(TINY_CODER)!r}, '-o', {str(tmp_path / 'm.gguf')!r}]))\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_a_full_standard_output_is_no_bug_of_dsq():
    for args in (["--help"], ["inspect", str(TINY_CODER)]):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "dsq.cli.main", *args],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert "bug in dsq" not in done.stderr
