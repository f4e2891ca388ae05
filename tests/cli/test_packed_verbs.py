"""GPTQ and EXL2 directories through the verbs: convert, eval, inspect, report, complete, chat."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dsq.cli.main import main
from dsq.convert.checkpoint import open_checkpoint
from tests.models import TINY_CODER, llama_config, write_hf
from tests.packed_models import write_exl2, write_gptq

HELDOUT = TINY_CODER / "heldout.txt"
CONFIG = llama_config(torch_dtype="float16")
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source`, and what was made of its weights: `gptq`, `scattered` (act-order), `exl2`."""
    folder = tmp_path_factory.mktemp("packed")
    write_hf(folder / "source", CONFIG, dtype="F32")
    write_gptq(folder / "gptq", config=CONFIG)
    write_gptq(folder / "scattered", config=CONFIG, desc_act=True)
    write_exl2(folder / "exl2", config=CONFIG)
    for name in ("gptq", "scattered"):
        settings = folder / name / "tokenizer_config.json"
        content = json.loads(settings.read_text())
        settings.write_text(json.dumps({**content, "chat_template": TEMPLATE}))
    for name in ("gptq", "exl2"):
        assert main(["convert", str(folder / name), "-o", str(folder / f"{name}.gguf")]) == 0
        out = str(folder / f"{name}-dense")
        assert main(["convert", "--to", "hf", str(folder / name), "-o", out]) == 0
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSQ_CACHE", str(tmp_path / "cache"))


def run_json(capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[Any, str]:
    capsys.readouterr()
    code = main([*map(str, args), "--json"])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return json.loads(shown.out), shown.err


def test_codes_are_moved_without_a_difference(files, tmp_path, capsys):
    report, _ = run_json(
        capsys, "convert", files / "gptq", "--exact", "-o", tmp_path / "exact.gguf"
    )
    assert report["receipt"]["exact"]
    assert report["receipt"]["types"] == {"q4_0": 14}
    assert report["receipt"]["largest_difference"] == 0
    assert report["size_bytes"] == (tmp_path / "exact.gguf").stat().st_size
    capsys.readouterr()
    assert main(["convert", str(files / "gptq"), "-o", str(tmp_path / "said.gguf")]) == 0
    assert "lossless" in capsys.readouterr().out
    assert main(["convert", str(files / "gptq"), "-o", str(tmp_path / "said.gguf")]) == 2
    assert "exists; give another output" in capsys.readouterr().err


def test_a_lossy_repack_says_so_and_exact_refuses_it(files, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    command = ["convert", str(files / "scattered"), "-o", str(out)]
    assert main([*command, "--exact"]) == 2
    assert "leave out --exact, or take --outtype f32" in capsys.readouterr().err
    plan, _ = run_json(capsys, *command, "--dry-run")
    assert {entry["type"] for entry in plan["plan"]} == {"q8_0", "q4_0"}
    assert not plan["exact"]
    assert not out.exists()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "12 of 14 matrices are not lossless; the largest difference of a weight is 0.00" in said
    assert "12 ×: act-order scatters its groups" in said
    assert "KL divergence was not measured: --text FILE does it" in said
    report, _ = run_json(capsys, *command, "--exact", "--outtype", "f32", "--force")
    assert report["receipt"]["largest_difference"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "gptq"], "is gptq already: --to gptq would round it a second time"),
        (["--to", "exl2", "--bpw", "4"], "is gptq already: --to exl2 would round it"),
        (["--outtype", "q4_k_m"], "choose auto, or f32, f16, bf16 or q8_0 for the rest"),
        (["--to", "hf", "--outtype", "q8_0"], "--outtype q8_0 for --to hf; choose auto"),
        (["--to", "hf", "--dither", "0.5"], "--dither goes with a .gguf"),
    ],
)
def test_what_a_packed_source_refuses(files, capsys, options, message):
    assert main(["convert", str(files / "gptq"), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("to", "out"), [("gguf", "m.gguf"), ("hf", "m")])
def test_a_norm_of_nan_is_refused_and_goes_through_when_asked(files, tmp_path, capsys, to, out):
    damaged, name = tmp_path / "damaged", "model.norm.weight"
    shutil.copytree(files / "gptq", damaged)
    change(damaged, lambda tensors: tensors[name].__setitem__(3, np.nan))
    command = ["convert", str(damaged), "--to", to, "-o", str(tmp_path / out)]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "1 weights are NaN or Inf" in said
    assert "--allow-nonfinite converts it all the same" in said
    assert main([*command, "--allow-nonfinite"]) == 0
    made = open_checkpoint(tmp_path / out)
    stored = made.data("output_norm.weight" if to == "gguf" else name).view(np.float32)
    assert np.flatnonzero(np.isnan(stored)).tolist() == [3]


def test_scales_are_finite_whatever_is_allowed(files, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    shutil.copytree(files / "gptq", damaged)
    name = "model.layers.1.mlp.up_proj.scales"
    change(damaged, lambda tensors: tensors[name].__setitem__((0, 5), np.nan))
    command = ["convert", str(damaged), "-o", str(tmp_path / "m.gguf"), "--allow-nonfinite"]
    assert main(command) == 2
    assert (
        "up_proj: 1 of 2048 scales are NaN or Inf; the file is damaged" in capsys.readouterr().err
    )


@pytest.mark.torch
def test_what_a_lossy_repack_adds_is_measured_on_a_text(files, tmp_path, capsys):
    """Also with the text before the source, which it would swallow."""
    out, text = tmp_path / "m.gguf", tmp_path / "text"
    text.write_text("\n".join(HELDOUT.read_text().splitlines()[:150]))
    source = files / "scattered"
    command = ["convert", "--text", text, source, "-o", out, "-t", "1"]
    report, _ = run_json(capsys, *command)
    found = report["divergence"]
    judged, _ = run_json(capsys, "eval", out, "--ref", source, "--text", text, "-t", "1")
    assert found["kld_mean"] == judged["kld_mean"]
    assert 0 < found["kld_mean"] < 0.01
    assert found["tokens"] == judged["tokens"]
    text.write_text("def")
    assert main([*map(str, command), "--force"]) == 2
    assert f"{out} is written, but was not measured:" in capsys.readouterr().err
    assert main(["convert", str(files / "source"), "--text", str(text)]) == 2
    assert "--text: calibrates --to gptq and --to exl2, and" in capsys.readouterr().err


def change(folder: Path, edit: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_exact_is_for_packed_sources(files, capsys):
    assert main(["convert", str(files / "source"), "--exact"]) == 2
    assert "--exact: only of a GPTQ or EXL2 directory" in capsys.readouterr().err


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["gptq", "exl2"])
def test_llama_cpp_on_the_gguf_is_transformers_on_the_dense_directory(files, kind):
    import torch
    from transformers import LlamaForCausalLM

    from dsq.runtime.llamacpp import LlamaCppEngine

    ids = np.random.default_rng(3).integers(0, 4000, 100)
    model = LlamaForCausalLM.from_pretrained(files / f"{kind}-dense", dtype=torch.float32).eval()
    with torch.inference_mode():
        theirs = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    with LlamaCppEngine(files / f"{kind}.gguf", n_ctx=len(ids), n_threads=1) as engine:
        ours = engine.logits(ids.tolist()).copy()
    norms = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    assert ((ours * theirs).sum(-1) / norms).min() > 0.999


@pytest.mark.torch
def test_eval_judges_the_exact_codes_of_a_directory_dsq_made(files, tmp_path, capsys):
    made, dense = tmp_path / "made", tmp_path / "dense"
    command = ["convert", files / "source", "--to", "gptq", "--group-size", "64", "--text", HELDOUT]
    run_json(capsys, *command, "--tokens", "512", "--ctx", "64", "-t", "1", "-o", made)
    run_json(capsys, "convert", made, "--to", "hf", "-o", dense)
    args = ("--ref", files / "source", "--text", HELDOUT, "-c", "128", "--chunks", "3", "-t", "1")
    packed, _ = run_json(capsys, "eval", made, *args)
    unpacked, _ = run_json(capsys, "eval", dense, *args)  # read by transformers itself
    assert packed["kld_mean"] == pytest.approx(unpacked["kld_mean"], rel=1e-4)
    assert packed["ppl"] == pytest.approx(unpacked["ppl"], rel=1e-6)
    assert 0 < packed["kld_mean"] < 0.1  # random weights instead give more than 4
    assert packed["bpw"] == pytest.approx(stored_bpw(made), rel=1e-6)
    assert packed["size_bytes"] == sum(f.stat().st_size for f in made.glob("*.safetensors"))


def test_verify_takes_a_gptq_directory_for_its_source_and_no_other(files, tmp_path, capsys):
    made, other = tmp_path / "made", tmp_path / "other"
    command = ["convert", files / "source", "--to", "gptq", "--group-size", "64", "--text", HELDOUT]
    run_json(capsys, *command, "--tokens", "512", "--ctx", "64", "-t", "1", "-o", made)
    receipt, _ = run_json(capsys, "verify", made, "--source", files / "source")
    assert receipt["ok"]
    write_hf(other, CONFIG, dtype="F32", seed=1)
    assert main(["verify", str(made), "--source", str(other)]) == 1
    assert "tensors" in capsys.readouterr().out


def stored_bpw(folder: Path) -> float:
    """By safetensors' own reader: every stored bit, over the weights that the config asks for."""
    n_bytes = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            n_bytes += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
    return 8 * n_bytes / sum(t.n_elements for t in open_checkpoint(folder).tensors.values())


@pytest.mark.torch
def test_one_page_for_all_formats(files, tmp_path, capsys):
    models = [files / name for name in ("gptq.gguf", "gptq", "exl2")]
    options = ["-c", "64", "--chunks", "2", "--text", HELDOUT, "-o", tmp_path / "r.html", "-t", "1"]
    report, _ = run_json(capsys, "report", *models, "--ref", files / "source", *options)
    found = {Path(entry["path"]).name: entry for entry in report["models"]}
    assert [entry["name"] for entry in report["models"]].count("gptq.gguf") == 1
    assert len({entry["measured"]["text_sha256"] for entry in found.values()}) == 1
    assert len({entry["measured"]["tokens"] for entry in found.values()}) == 1
    for name in ("gptq", "exl2"):
        assert found[name]["measured"]["bpw"] == pytest.approx(stored_bpw(files / name), rel=1e-6)
        assert len(found[name]["layer_error"]) == 2
    # the same numbers in another file: what llama.cpp rounds is small beside what GPTQ did
    klds = [found[name]["measured"]["kld_mean"] for name in ("gptq.gguf", "gptq")]
    assert klds[0] == pytest.approx(klds[1], rel=0.1)
    page = (tmp_path / "r.html").read_text()
    assert "EXL2 and GPTQ ran in torch, their exact codes in float32" in page


def test_inspect_tells_what_is_stored(files, capsys):
    report, _ = run_json(capsys, "inspect", files / "exl2")
    assert report["quantization"] == "exl2"
    assert report["bpw"] == pytest.approx(stored_bpw(files / "exl2"), rel=1e-4)
    assert main(["inspect", str(files / "gptq")]) == 0
    shown = capsys.readouterr().out
    assert "(hf, gptq)" in shown
    assert "14 × gptq 4-bit" in shown


def test_verify_takes_a_repack_and_an_unpacking(files, capsys):
    for name, artifact in (("gptq", "gptq.gguf"), ("exl2", "exl2.gguf"), ("gptq", "gptq-dense")):
        command = ["verify", str(files / artifact), "--source", str(files / name), "-t", "1"]
        assert main(command) == 0, capsys.readouterr().out


@pytest.mark.torch
def test_complete_in_torch_is_transformers_own_greedy_search(files, capsys):
    import torch
    from transformers import LlamaForCausalLM

    from dsq.runtime.source import Source
    from dsq.tokenizer_port.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_vocabulary(Source(files / "exl2").vocabulary)
    ids = tokenizer.encode("import os\n")
    model = LlamaForCausalLM.from_pretrained(files / "exl2-dense", dtype=torch.float32).eval()
    out = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
    command = ("complete", files / "exl2", "-p", "import os\n", "-n", "8", "-t", "1")
    report, said = run_json(capsys, *command, "--engine", "torch")
    assert report["text"] == tokenizer.decode(out.tolist())
    assert "lossless" not in said


def test_complete_goes_through_the_cache(files, tmp_path, capsys):
    command = ("complete", files / "gptq", "-p", "import os\n", "-n", "8", "-t", "1")
    wanted, _ = run_json(capsys, "complete", files / "gptq.gguf", *command[2:])
    first, said = run_json(capsys, *command)
    assert first["text"] == wanted["text"]
    assert "repacking" in said
    assert len(list((tmp_path / "cache" / "repacked").glob("*.gguf"))) == 1
    again, said = run_json(capsys, *command, "--engine", "llama.cpp")
    assert again["text"] == wanted["text"]
    assert said == ""


def test_chat_says_that_a_repack_is_not_lossless(files, capsys):
    command = ("chat", files / "scattered", "-p", "hello", "-n", "4", "--temp", "0", "-t", "1")
    report, said = run_json(capsys, *command)
    assert report["tokens"] > 0
    assert "not lossless: 12 of 14 matrices were rounded to q8_0" in said


@pytest.mark.torch
def test_chat_runs_the_exact_codes_in_torch(files, tmp_path, capsys):
    command = ("chat", files / "scattered", "-p", "hello", "-n", "4", "--temp", "0", "-t", "1")
    report, said = run_json(capsys, *command, "--engine", "torch")
    assert report["tokens"] > 0
    assert "lossless" not in said
    assert not (tmp_path / "cache").exists()
