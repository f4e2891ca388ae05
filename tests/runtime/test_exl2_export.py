"""`dsq convert --to exl2`: what is written, how far it is from the source, and after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from dsq.cli.main import main
from dsq.convert.checkpoint import open_checkpoint
from dsq.errors import DsqError, InputError
from dsq.quant.stats import read_stats
from dsq.runtime import decoder
from dsq.runtime.calibration import calibrate
from dsq.runtime.fidelity import exl2, exl2_measure
from dsq.runtime.fidelity.exl2 import Report, convert
from dsq.runtime.fidelity.exl2_plan import Options, plan_exl2
from tests.models import TINY_CODER, llama_config, write_hf
from tests.quant.exl2_reference import reconstruct
from tests.runtime.changed import changed
from tests.runtime.dying import die

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

STDLIB = Path(sysconfig.get_path("stdlib"))
HELD_OUT = (TINY_CODER / "heldout.txt").read_text()


def windows(model: Path, text: str, n_tokens: int, n_ctx: int = 128) -> np.ndarray:
    options = calibrate.Options(n_ctx=n_ctx, n_tokens=n_tokens)
    return calibrate.choose_windows(open_checkpoint(model), [text], options)


def export(
    model: Path,
    out: Path,
    bpw: float,
    ids: np.ndarray,
    measurement: Path | None = None,
    **more: Any,
) -> Report:
    head_bits = more.pop("head_bits", 6)
    options = Options(bpw, head_bits, n_threads=1, device="cpu")
    plan = plan_exl2(open_checkpoint(model), options, measurement)
    return convert(plan, ids, out, about_text={"name": "stdlib"}, **more)


def logits(model: Path, ids: np.ndarray):
    """(windows, n_ctx, n_vocab) by dsq's own graph."""
    checkpoint = open_checkpoint(model)
    graph = decoder.Decoder(checkpoint.spec, ids.shape[1])
    hidden = decoder.read_tensor(checkpoint, "model.embed_tokens.weight")[torch.from_numpy(ids)]
    with torch.inference_mode():
        for layer in range(checkpoint.spec.n_layer):
            hidden = graph.layer(decoder.read_layer(checkpoint, layer), hidden)
        norm = decoder.read_tensor(checkpoint, "model.norm.weight")
        tied = checkpoint.spec.tied
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        return graph.logits(norm, decoder.read_tensor(checkpoint, name), hidden)


def kld(model: Path, other: Path, ids: np.ndarray) -> float:
    p, q = (logits(path, ids).double().log_softmax(-1) for path in (model, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def layer_bits(out: Path) -> tuple[int, int]:
    """Bits that the layers' matrices take in the file, and their weights."""
    tensors = load_file(out / "model.safetensors")
    parts = {n: t for n, t in tensors.items() if ".layers." in n and ".q_" in n}
    n_weights = 0
    for name, words in parts.items():
        if name.endswith("q_weight"):
            rows = parts[name.replace("q_weight", "q_invperm")].size
            n_weights += rows * words.shape[1]
    return sum(8 * t.nbytes for t in parts.values()), n_weights


# tiny-coder, which has learnt something


@pytest.fixture(scope="module")
def coder(tmp_path_factory: pytest.TempPathFactory) -> dict[float, tuple[Path, Report]]:
    """tiny-coder at two targets, the second by the first one's measurement."""
    folder = tmp_path_factory.mktemp("coder")
    text = "".join((STDLIB / name).read_text() for name in ("ast.py", "argparse.py"))
    ids = windows(TINY_CODER, text, 4096)
    first, second = folder / "4", folder / "2.5"
    made = {4.0: (first, export(TINY_CODER, first, 4.0, ids))}
    report = export(TINY_CODER, second, 2.5, ids, first / "measurement.json")
    return {**made, 2.5: (second, report)}


@pytest.mark.parametrize("bpw", [4.0, 2.5])
def test_the_target_counts_the_layers_as_exllamav2_does(coder, bpw: float) -> None:
    out, report = coder[bpw]
    bits, n_weights = layer_bits(out)
    assert bpw - 0.02 <= bits / n_weights <= bpw
    assert report.bpw == pytest.approx(bits / n_weights, abs=1e-4)
    # The whole: embedding and head weigh much in so small a model.
    source = sum(info.n_elements for info in open_checkpoint(TINY_CODER).tensors.values())
    size = (out / "model.safetensors").stat().st_size
    assert report.file_bpw == pytest.approx(8 * size / source, rel=0.01)
    assert {t.name for t in report.tensors} == {
        n.removesuffix(".q_weight") for n in load_file(out / "model.safetensors") if "q_weight" in n
    }


def test_more_bits_are_nearer_to_the_source(coder) -> None:
    ids = windows(TINY_CODER, HELD_OUT, 1024)
    klds = {bpw: kld(TINY_CODER, out, ids) for bpw, (out, _) in coder.items()}
    assert klds[4.0] < 0.01
    assert 3 * klds[4.0] < klds[2.5] < 0.2
    report = coder[4.0][1]
    assert report.predicted_kld is not None
    assert 0.3 < report.predicted_kld / klds[4.0] < 3  # of the layers alone, before earlier errors


def test_exllamav2_finds_what_dsq_reads(coder) -> None:
    out, _ = coder[2.5]
    checkpoint = open_checkpoint(out)
    tensors = load_file(out / "model.safetensors")
    widths = set()
    for name in [n for n in tensors if n.endswith(".q_weight")]:
        module = name.removesuffix(".q_weight")
        parts = {n.split(".")[-1]: t for n, t in tensors.items() if n.startswith(f"{module}.q_")}
        theirs = reconstruct(parts).T
        ours = decoder.read_tensor(checkpoint, f"{module}.weight").numpy()
        np.testing.assert_array_equal(theirs[: len(ours)], ours.astype(np.float16))
        widths.update(parts["q_groups"][::2].tolist())
    assert len(widths) > 3
    dense = decoder.read_tensor(checkpoint, "model.embed_tokens.weight").numpy()
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], dense.astype(np.float16))


def test_the_config_says_it(coder) -> None:
    out, _ = coder[4.0]
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "exl2",
        "version": "0.3.2",
        "bits": 4.0,
        "head_bits": 6,
        "calibration": {"rows": 32, "length": 128, "dataset": "stdlib"},
    }
    # By exllamav2's rules (config.py): "linear" multiplies positions by 1 / factor.
    assert (config["rope_theta"], config["rope_scaling"]["type"]) == (100000, "linear")
    assert config["rope_scaling"]["factor"] == 4.0
    eos = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert eos == json.loads((TINY_CODER / "generation_config.json").read_text())["eos_token_id"]


@pytest.mark.gpu
def test_exllamav2_gives_the_logits_of_our_reading(coder) -> None:
    if not torch.cuda.is_available():  # without one, exllamav2 cannot be imported
        pytest.skip("no CUDA card")
    exllamav2 = pytest.importorskip("exllamav2")
    out, _ = coder[4.0]
    ids = windows(TINY_CODER, HELD_OUT, 128)
    config = exllamav2.ExLlamaV2Config(str(out))
    config.max_seq_len = 256
    model = exllamav2.ExLlamaV2(config)
    model.load()
    theirs = model.forward(torch.from_numpy(ids.astype(np.int64))).float().cpu()
    ours = logits(out, ids)
    theirs = theirs[..., : ours.shape[-1]]
    p, q = (values.double().log_softmax(-1) for values in (ours, theirs))
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 1e-4
    similar = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)
    assert float(similar.min()) > 0.999


# A random model, tied, with one key and value head and rows that are no multiple of 64


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = llama_config(
        hidden_size=96,
        intermediate_size=160,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return write_hf(tmp_path_factory.mktemp("small") / "model", config)


@pytest.fixture(scope="module")
def few(small: Path) -> np.ndarray:
    return windows(small, HELD_OUT, 512, n_ctx=64)


@pytest.fixture(scope="module")
def whole(small: Path, few: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    export(small, out, 4.5, few)
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("bpw", [2.8, 5.5, 8.0, 8.3])
def test_any_target_and_shape(bpw: float, small: Path, few, whole: Path, tmp_path: Path) -> None:
    export(small, tmp_path / "out", bpw, few, whole / "measurement.json", head_bits=4)
    bits, n_weights = layer_bits(tmp_path / "out")
    assert bpw - 0.02 <= bits / n_weights <= bpw


def test_a_head_of_16_bits_stays_the_embedding(
    small: Path, few, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export(small, out, 4.5, few, whole / "measurement.json", head_bits=16)
    assert not any("lm_head" in name for name in load_file(out / "model.safetensors"))
    tied = [
        json.loads((d / "config.json").read_text())["tie_word_embeddings"] for d in (out, whole)
    ]
    assert tied == [True, False]
    assert open_checkpoint(out).spec.tied


def test_the_same_measurement_gives_the_same_bytes(
    small: Path, few, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exl2_measure, "candidates", None)  # nothing is measured
    export(small, tmp_path / "out", 4.5, few, whole / "measurement.json")
    assert files(tmp_path / "out") == files(whole)


def test_statistics_spare_the_passes(
    small: Path, few, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = calibrate.Options(hessians=True, gradients=True, n_threads=1, device="cpu")
    calibrate.calibrate(small, tmp_path / "stats", few, options=options)
    monkeypatch.setattr(exl2_measure, "calibrate", None)
    monkeypatch.setattr(exl2_measure, "_Pass", None)
    export(small, tmp_path / "out", 4.5, few, stats=read_stats(tmp_path / "stats"))
    assert files(tmp_path / "out")["model.safetensors"] == files(whole)["model.safetensors"]


_CHILD = """
import os, signal, sys
from pathlib import Path
import numpy as np
from dsq.convert.checkpoint import open_checkpoint
from dsq.runtime.calibration.borders import Border
from dsq.runtime.calibration.workdir import WorkDir
from dsq.runtime.fidelity.exl2 import convert
from dsq.runtime.fidelity.exl2_plan import Options, plan_exl2

model, out, step, writes, ids = sys.argv[1:]
once, write, inside, left = WorkDir.once, Border.write, False, int(writes)

def watched(self, name, make):
    global inside
    inside = inside or name == step
    return once(self, name, make)

def dying(border, start, values):
    global left
    if inside:
        left -= 1
        if left == 0:
            write(border, start, values[:, :5])  # the last thing it does is half done
            os.kill(os.getpid(), signal.SIGKILL)
    write(border, start, values)

WorkDir.once, Border.write = watched, dying
plan = plan_exl2(open_checkpoint(model), Options(4.5, n_threads=1, device="cpu"))
convert(plan, np.load(ids), Path(out), about_text={"name": "stdlib"})
"""


@pytest.mark.parametrize(
    ("step", "writes", "resumed"),
    [
        pytest.param("gradients", 2, 0, marks=pytest.mark.slow),
        ("measure 1", 1, 2),
        pytest.param("layer 0", 4, 4, marks=pytest.mark.slow),
        ("layer 1", 3, 5),
    ],
)
def test_killed_and_run_again_gives_the_same_bytes(
    step: str, writes: int, resumed: int, small: Path, few, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    np.save(tmp_path / "ids.npy", few)
    command = [sys.executable, "-c", _CHILD, small, out, step, str(writes), tmp_path / "ids.npy"]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    with pytest.raises(InputError, match="unfinished run with other settings"):
        export(small, out, 3.5, few)
    assert export(small, out, 4.5, few).resumed_steps == resumed
    assert files(out) == files(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "ids.npy"}


_CONVERT = """
from pathlib import Path
import numpy as np
from dsq.convert.checkpoint import open_checkpoint
from dsq.runtime.fidelity.exl2 import convert
from dsq.runtime.fidelity.exl2_plan import Options, plan_exl2

options = Options(4.5, n_threads=1, device="cpu")
plan = plan_exl2(open_checkpoint(model), options, Path(measurement) if measurement else None)
convert(plan, np.load(ids), Path(out), about_text={"name": "stdlib"})
"""
WRITE = "dsq.convert.hf.quantized_dir:write_at"
WORK = "dsq.runtime.calibration.workdir:WorkDir"
LAYERS = 2 * (7 * 5 + 2)  # tensors: five of each matrix, and two norms


@pytest.mark.parametrize(
    ("where", "nth", "resumed"),
    [
        # After the gradients and two layers:
        pytest.param("dsq.runtime.fidelity.exl2:allocate", 1, 3, marks=pytest.mark.slow),
        (WRITE, 1 + LAYERS + 2 + 3, 3),  # the header, the layers, what is dense, half of the head
        pytest.param("dsq.convert.hf.quantized_dir:write_text", 2, 4, marks=pytest.mark.slow),
        pytest.param(
            "dsq.runtime.calibration.workdir:WorkDir.finish", 1, 4, marks=pytest.mark.slow
        ),
        pytest.param(f"{WORK}._clear", 1, 4, marks=pytest.mark.slow),  # it has its name already
    ],
)
def test_killed_in_the_choice_the_head_or_the_naming(
    where: str, nth: int, resumed: int, small: Path, few, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    np.save(tmp_path / "ids.npy", few)
    measurement = None if where.endswith(":allocate") else whole / "measurement.json"
    values = {"model": small, "ids": tmp_path / "ids.npy", "measurement": measurement, "out": out}
    die(_CONVERT, where, nth, **values)
    assert out.exists() == where.endswith("_clear")
    assert export(small, out, 4.5, few, measurement).resumed_steps == resumed
    assert files(out) == files(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "ids.npy"}


def test_a_measurement_outlives_a_choice_that_failed(
    small: Path, few, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def unsolved(*_: Any) -> None:
        raise DsqError("the integer program was not solved")

    with monkeypatch.context() as patch:
        patch.setattr(exl2, "allocate", unsolved)
        with pytest.raises(DsqError, match=r"not solved; .*--measurement .*out\.measurement\.json"):
            export(small, out, 4.5, few)
    (kept,) = tmp_path.iterdir()
    export(small, out, 4.5, few, kept)
    assert files(out) == files(whole)


def test_other_statistics_or_weights_are_not_gone_on_with(
    small: Path, few, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though their paths are the same, and each matrix's first row is."""
    source, out, stats = tmp_path / "model", tmp_path / "out", tmp_path / "stats"
    shutil.copytree(small, source)
    options = calibrate.Options(hessians=True, gradients=True, n_threads=1, device="cpu")
    calibrate.calibrate(source, stats, few, options=options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(exl2._Run, "layer", interrupted)
        export(source, out, 4.5, few, stats=read_stats(stats))
    kept, state = stats.read_bytes(), stats.stat()
    calibrate.calibrate(source, stats, few[:1], options=options, force=True)
    with pytest.raises(InputError, match="unfinished run with other settings"):
        export(source, out, 4.5, few, stats=read_stats(stats))
    stats.write_bytes(kept)
    os.utime(stats, ns=(state.st_atime_ns, state.st_mtime_ns))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(exl2._Run, "layer", interrupted)
        export(source, out, 4.5, few, stats=read_stats(stats))  # the same: gone on with
    changed(small, source, "model.layers.1.mlp.up_proj.weight", 0.5)
    with pytest.raises(InputError, match="unfinished run with other settings"):
        export(source, out, 4.5, few, stats=read_stats(stats))
    assert (tmp_path / "out.partial").is_dir()


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("model.layers.1.mlp.up_proj.weight", np.inf, "weights are NaN or Inf"),
        ("model.norm.weight", np.nan, "weights are NaN or Inf"),
        ("model.norm.weight", 1e5, r"weights go up to \d+, which f16 cannot hold"),
    ],
)
def test_damaged_weights_are_named_before_the_measurement(
    name: str,
    value: float,
    told: str,
    small: Path,
    few,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = changed(small, tmp_path / "model", name, value)
    monkeypatch.setattr(exl2, "measure", None)
    with pytest.raises(InputError, match=f"{name}: {told}"):
        export(source, tmp_path / "out", 4.5, few)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_is_refused(small: Path, few, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for bpw, told in (
        (2.05, "take 2"),
        (1.0, "above 2"),
        (float("nan"), "above 2"),
    ):
        with pytest.raises(InputError, match=told):
            export(small, out, bpw, few, whole / "measurement.json")
        with pytest.raises(InputError, match=told):  # before the measurement
            plan_exl2(open_checkpoint(small), Options(bpw))
    with pytest.raises(InputError, match=r"take 2\.\d+ to 8\.\d+ bits"):  # near the top
        plan_exl2(open_checkpoint(TINY_CODER), Options(8.45))
    with pytest.raises(InputError, match=r"whole.*a measurement of another model"):
        export(TINY_CODER, out, 4.0, few, whole / "measurement.json")
    odd = write_hf(tmp_path / "odd", llama_config(hidden_size=80, num_key_value_heads=1))
    with pytest.raises(InputError, match=r"q_proj: 80 inputs are no multiple of 32.*GGUF"):
        export(odd, out, 4.0, few)
    with pytest.raises(InputError, match="already"):
        export(whole, out, 4.0, few)
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


def test_from_the_command_line(small: Path, tmp_path: Path, capsys) -> None:
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text(HELD_OUT)
    command = ["convert", str(small), "--to", "exl2", "-t", "1", "-o", str(out)]
    assert main([*command, "--text", str(text)]) == 2
    assert "--bpw" in capsys.readouterr().err
    calibration = ["--text", str(text), "--tokens", "256", "--ctx", "64"]
    assert main([*command, *calibration, "--bpw", "4", "--head-bits", "8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["bpw"], report["head_bits"]) == (pytest.approx(3.99, abs=0.01), 8)
    assert report["file_bpw"] > report["bpw"]
    again = ["--measurement", str(out / "measurement.json"), "--force"]
    assert main([*command, *calibration, "--bpw", "3", *again]) == 0
    told = capsys.readouterr().out
    assert "EXL2, 2.9" in told or "EXL2, 3.0" in told
    calibrate.calibrate(small, tmp_path / "stats", windows(small, HELD_OUT, 256, n_ctx=64))
    assert main([*command, "--stats", str(tmp_path / "stats"), "--bpw", "3", *again]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["calibration"]["dataset"] == "stats"  # not where it lay
