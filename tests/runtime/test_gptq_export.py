"""GPTQ directories: real peers read what dsq reckoned with; a killed run ends in the same bytes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from dsq.convert import atomic
from dsq.convert.checkpoint import open_checkpoint
from dsq.errors import InputError
from dsq.quant.gptq_layout import GPTQ_BITS, PARTS, unpack
from dsq.runtime.calibration.workdir import WorkDir
from dsq.runtime.fidelity import distill, gptq, gptq_plan
from tests.models import ROOT, TINY_CODER, llama_config, write_hf
from tests.runtime.changed import changed
from tests.runtime.dying import die

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from dsq.quant.gptq import Scheme  # noqa: E402

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
    "attention_bias": True,
}


def windows(n: int = 4, n_ctx: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 4000, (n, n_ctx)).astype(np.int32)


def export(source: Path, out: Path, scheme: Scheme, **options: Any) -> gptq.Report:
    chosen = gptq_plan.Options(scheme, n_threads=1, device="cpu", **options)
    return gptq.convert(gptq_plan.plan_gptq(open_checkpoint(source), chosen), windows(), out)


def dequantized(out: Path) -> dict[str, np.ndarray]:
    """The matrices by module name, from the file's bytes."""
    config = json.loads((out / "quantize_config.json").read_text())
    found = {}
    with safe_open(out / "model.safetensors", framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118
            module, _, part = name.rpartition(".")
            if part != "qweight":
                continue
            parts = {p: file.get_tensor(f"{module}.{p}") for p in PARTS}
            bits = 32 * len(parts["qweight"]) // parts["g_idx"].size
            found[module] = unpack(parts, bits, config["checkpoint_format"]).dequantized()
    return found


def our_logits(source: Path, out: Path, ids: np.ndarray) -> np.ndarray:
    """transformers with the source's embedding and head, the directory's norms and our dequantized
    matrices, in float32."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    weights = {f"{n}.weight": torch.from_numpy(w) for n, w in dequantized(out).items()}
    with safe_open(out / "model.safetensors", framework="pt") as file:
        norms = [name for name in file.keys() if name.endswith("norm.weight")]  # noqa: SIM118
        weights |= {name: file.get_tensor(name).float() for name in norms}
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    with torch.inference_mode():
        logits: np.ndarray = model(torch.from_numpy(ids.astype(np.int64))).logits.numpy()
    return logits


def peer_logits(peer: str, out: Path, ids: np.ndarray, folder: Path) -> tuple[np.ndarray, Any]:
    np.save(folder / "ids.npy", ids)
    command = [sys.executable, "-m", "tests.runtime.gptq_probe", peer, out, folder / "ids.npy"]
    done = subprocess.run(
        [*command, folder / "out.npz"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(folder / "out.npz")["logits"], json.loads((folder / "out.json").read_text())


def least_cosine(a: np.ndarray, b: np.ndarray) -> float:
    both = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return float(both.min())


# The real peers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("peer", "kernel", "least"),
    [
        ("gptqmodel:gptq_torch:float32", "TorchLinear", 0.999999),
        ("gptqmodel:gptq_torch:bfloat16", "TorchLinear", 0.999),
        ("transformers:float32", "TorchAtenLinear", 0.999),  # its kernel holds x in bf16
    ],
)
def test_peers_compute_what_we_dequantize(
    peer: str, kernel: str, least: float, tmp_path: Path
) -> None:
    pytest.importorskip("gptqmodel")
    out = tmp_path / "out"
    few_steps = distill.Options(lr=2e-3, batch_tokens=64, check_every=1)
    report = export(TINY_CODER, out, Scheme(4, 64, act_order=True), distill=few_steps)
    assert report.distillation is not None
    assert report.distillation.best_step > 0  # other scales and norms than error feedback's
    ids = windows(2, 128)
    theirs, about = peer_logits(peer, out, ids, tmp_path)
    assert about["kernels"] == [kernel]
    assert about["first_inv_freq"] == 0.25  # RoPE factor 4
    assert least_cosine(our_logits(TINY_CODER, out, ids), theirs) > least


@pytest.mark.slow
@pytest.mark.parametrize("bits", GPTQ_BITS)
@pytest.mark.parametrize(("sym", "form"), [(True, "gptq"), (False, "gptq"), (False, "gptq_v2")])
def test_every_width_and_zero_point_in_gptqmodel(
    bits: int, sym: bool, form: Any, tmp_path: Path
) -> None:
    """Biases, MQA, a matrix at other bits and one left as it is."""
    pytest.importorskip("gptqmodel")
    source = write_hf(tmp_path / "model", llama_config(**SMALL), dtype="F16")
    dynamic = (
        gptq_plan.Override(r".*layers\.1\.mlp\.up_proj", 8, 32),
        gptq_plan.Override(r".*layers\.0\.self_attn\.o_proj", None),
    )
    out = tmp_path / "out"
    export(
        source, out, Scheme(bits, 32, sym, act_order=True), checkpoint_format=form, dynamic=dynamic
    )
    ids = windows(2, 32)
    theirs, about = peer_logits("gptqmodel:gptq_torch:float32", out, ids, tmp_path)
    assert about["kernels"] == ["TorchLinear"]
    assert least_cosine(our_logits(source, out, ids), theirs) > 0.99999


# Resuming


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("small") / "model", llama_config(**SMALL))


SCHEME = Scheme(4, 32, act_order=True)

_CODE = """
from pathlib import Path
from dsq.quant.gptq import Scheme
from tests.runtime.test_gptq_export import SCHEME, export
export(Path(model), Path(out), SCHEME)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("where", "nth", "resumed"),
    [
        ("dsq.convert.hf.quantized_dir:DirectoryWriter.put", 9, 0),
        ("dsq.runtime.fidelity.two_ways:TwoWays.see", 6, 1),
        ("dsq.runtime.fidelity.two_ways:TwoWays.leave", 2, 1),
        ("dsq.runtime.calibration.workdir:WorkDir.save", 4, 2),
        ("dsq.runtime.fidelity.gptq:_Run.rest", 1, 3),
        ("dsq.convert.hf.quantized_dir:write_text", 3, 3),
    ],
)
def test_killed_and_run_again_gives_the_same_bytes(
    small: Path, tmp_path: Path, where: str, nth: int, resumed: int
) -> None:
    export(small, tmp_path / "whole", SCHEME)
    out = tmp_path / "killed"
    die(_CODE, where, nth, model=small, out=out)
    assert not out.exists()
    assert export(small, out, SCHEME).resumed_layers == resumed
    assert contents(out) == contents(tmp_path / "whole")
    assert {p.name for p in tmp_path.iterdir()} == {"whole", "killed"}


def test_other_settings_are_not_gone_on_with(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    die(_CODE, "dsq.runtime.fidelity.two_ways:TwoWays.leave", 2, model=small, out=out)
    with pytest.raises(InputError, match="unfinished run with other settings"):
        export(small, out, Scheme(3, 32))


def test_other_weights_are_not_gone_on_with(small: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(small, source)
    die(_CODE, "dsq.runtime.fidelity.two_ways:TwoWays.leave", 2, model=source, out=out)
    changed(small, source, "model.layers.2.mlp.up_proj.weight", 0.5)  # in the last row
    with pytest.raises(InputError, match="unfinished run with other settings"):
        export(source, out, SCHEME)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.2.mlp.up_proj.weight", np.inf),
        ("model.embed_tokens.weight", np.nan),
        ("model.norm.weight", np.nan),
        ("lm_head.weight", np.nan),
    ],
)
def test_damaged_weights_are_named_before_the_first_layer(
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: float,
) -> None:
    source = changed(small, tmp_path / "model", name, value)
    monkeypatch.setattr(gptq, "_Run", None)
    with pytest.raises(InputError, match=f"{name}: weights are NaN or Inf"):
        export(source, tmp_path / "out", SCHEME)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_second_run_is_refused(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with WorkDir(out, ""), pytest.raises(InputError, match="is being written by another run"):
        export(small, out, SCHEME)


def test_a_disk_too_small_is_told_before(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = atomic.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"has 1000 B free, but out needs .*free some space"):
        export(small, tmp_path / "out", SCHEME)
    assert list(tmp_path.iterdir()) == []


# What is in the directory


def test_both_configs_say_the_same_and_gptqmodel_keys(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    override = gptq_plan.Override(".*down_proj", 8, 32)
    export(small, out, Scheme(3, 32, sym=False, act_order=True), dynamic=(override,))
    own = json.loads((out / "quantize_config.json").read_text())
    assert json.loads((out / "config.json").read_text())["quantization_config"] == own
    assert own["bits"] == 3
    assert own["dynamic"] == {"+:.*down_proj": {"bits": 8, "group_size": 32}}
    assert (own["sym"], own["desc_act"], own["lm_head"]) == (False, True, False)
    tensors = shapes(out)
    assert tensors["model.layers.0.mlp.down_proj.qweight"] == (96 * 8 // 32, 64)
    assert tensors["model.layers.0.mlp.up_proj.qweight"] == (64 * 3 // 32, 96)


def shapes(out: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(out / "model.safetensors", framework="numpy") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def test_at_8_bits_every_matrix_is_near_the_original(small: Path, tmp_path: Path) -> None:
    from dsq.runtime.decoder import read_tensor

    export(small, tmp_path / "out", Scheme(8, 32, act_order=True))
    checkpoint = open_checkpoint(small)
    found = dequantized(tmp_path / "out")
    assert len(found) == 21
    for module, values in found.items():
        rows = read_tensor(checkpoint, f"{module}.weight").numpy()
        assert np.abs(values - rows).max() <= 0.03 * np.abs(rows).max(), module


def test_a_group_that_does_not_divide(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "model", llama_config(**{**SMALL, "intermediate_size": 160}))
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.down_proj: groups of 64.*160 inputs"):
        export(source, tmp_path / "out", Scheme(4, 64))
    export(source, tmp_path / "out", Scheme(4, 64), allow_ragged=True)
    assert dequantized(tmp_path / "out")["model.layers.0.mlp.down_proj"].shape == (64, 160)


def test_a_dynamic_rule_that_matches_nothing(small: Path) -> None:
    options = gptq_plan.Options(SCHEME, dynamic=(gptq_plan.Override("down_proj", 8),))
    with pytest.raises(InputError, match="--dynamic down_proj: no matrix's name starts so"):
        gptq_plan.plan_gptq(open_checkpoint(small), options)
