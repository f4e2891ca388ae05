"""GPTQ and EXL2 to GGUF and to dense directories: the same weights, or the difference measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint, open_checkpoint
from dsq.convert.hf.writer import is_model_file
from dsq.convert.names import gguf_name, permuted_heads
from dsq.convert.pipeline import plan_gguf
from dsq.convert.repack import float_type, plan_repack, run_repack
from dsq.convert.tensor_plan import half_split_rows
from dsq.convert.unpack import plan_unpack, run_unpack
from dsq.convert.verify_tensors import METHOD
from dsq.errors import InputError
from dsq.quant import ggml
from dsq.quant.presets import PRESETS
from dsq.quant.scheme import BY_NAME, F32
from tests.models import llama_config
from tests.packed_models import is_linear, write_exl2, write_gptq

Weights = dict[str, np.ndarray]


def opened(folder: Path) -> HfCheckpoint:
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, HfCheckpoint)
    return checkpoint


def repacked(folder: Path, **options: Any) -> tuple[GgufCheckpoint, dict[str, Any]]:
    out = folder.with_suffix(".gguf")
    _, receipt = run_repack(plan_repack(opened(folder), **options), out, threads=2)
    gguf = open_checkpoint(out)
    assert isinstance(gguf, GgufCheckpoint)
    return gguf, receipt


def rows(checkpoint: GgufCheckpoint | HfCheckpoint, hf: str) -> np.ndarray:
    """A tensor in Hugging Face's row order, dequantized by ggml."""
    name = gguf_name(hf) if checkpoint.format == "gguf" else hf
    info = checkpoint.tensors[name]
    values = ggml.dequantize(checkpoint.data(name), info.type, info.shape[-1]).reshape(info.shape)
    heads = permuted_heads(name, checkpoint.spec) if checkpoint.format == "gguf" else None
    return values[half_split_rows(len(values), heads)] if heads else values


@pytest.mark.parametrize(
    ("bits", "sym", "to"),
    [
        (4, True, "q4_0"),
        (3, True, "q4_0"),
        (3, False, "q4_0"),
        (2, False, "q4_0"),
        (8, True, "q8_0"),
    ],
)
def test_codes_stay_what_they_are(tmp_path, bits, sym, to):
    meant = write_gptq(tmp_path / "m", bits=bits, sym=sym)
    gguf, receipt = repacked(tmp_path / "m", exact=True)
    assert METHOD not in gguf.gguf.metadata
    assert receipt["exact"]
    assert receipt["largest_difference"] == 0
    for name, weight in meant.items():
        if is_linear(name):
            assert gguf.tensors[gguf_name(name)].type.name == to
        np.testing.assert_array_equal(rows(gguf, name), weight, err_msg=name)


def test_shared_kv_heads_and_static_groups(tmp_path):
    """Act-order with static groups leaves g_idx in order; one KV head is permuted as one."""
    config = llama_config(num_key_value_heads=1, torch_dtype="float16")
    meant = write_gptq(tmp_path / "m", config=config)
    said = json.loads((tmp_path / "m/config.json").read_text())
    said["quantization_config"] |= {"desc_act": True, "static_groups": True}
    (tmp_path / "m/config.json").write_text(json.dumps(said))
    gguf, _ = repacked(tmp_path / "m", exact=True)
    for name, weight in meant.items():
        np.testing.assert_array_equal(rows(gguf, name), weight, err_msg=name)


def test_asymmetric_4_bits_are_off_by_the_minimums_rounding(tmp_path):
    meant = write_gptq(tmp_path / "m", sym=False)
    gguf, receipt = repacked(tmp_path / "m")
    told = {tensor["name"]: tensor for tensor in receipt["tensors"]}
    for name, weight in meant.items():
        if is_linear(name):
            entry = told[gguf_name(name)]
            assert entry["type"] == "q4_1"
            off = np.abs(rows(gguf, name).astype(np.float64) - weight).max()
            assert 0 < off == pytest.approx(entry["largest_difference"], rel=1e-3)
    assert receipt["largest_difference"] < 2e-4  # weights up to 0.3
    with pytest.raises(InputError, match="without a difference: f16 rounds its minimums"):
        repacked(tmp_path / "m", exact=True)


def test_scattered_groups_are_rounded_and_measured(tmp_path):
    meant = write_gptq(tmp_path / "m", desc_act=True)
    gguf, receipt = repacked(tmp_path / "m", gather=False)
    assert receipt["types"] == {"q8_0": 14}
    for entry in receipt["tensors"]:
        name = next(n for n in meant if gguf_name(n) == entry["name"])
        off = rows(gguf, name) - meant[name]
        assert np.abs(off).max() == entry["largest_difference"]
        relative = np.linalg.norm(off) / np.linalg.norm(meant[name])
        assert relative == pytest.approx(entry["added_error"], rel=1e-4)
        assert relative < 0.006
    with pytest.raises(InputError, match="act-order scatters its groups .* take --outtype f32"):
        repacked(tmp_path / "m", exact=True)
    gguf, receipt = repacked_again(tmp_path / "m", exact=True, gather=False, to=F32)
    for name, weight in meant.items():
        np.testing.assert_array_equal(rows(gguf, name), weight)


def test_groups_in_order_that_are_no_whole_blocks_are_called_so(tmp_path):
    write_gptq(tmp_path / "m", group_size=16)
    with pytest.raises(InputError, match="its groups are no whole blocks of 32 inputs"):
        repacked(tmp_path / "m", exact=True)


def repacked_again(folder: Path, **options: Any) -> tuple[GgufCheckpoint, dict[str, Any]]:
    folder.with_suffix(".gguf").unlink()
    return repacked(folder, **options)


def test_down_proj_is_gathered_through_gate_and_up(tmp_path):
    """Its codes stay; the rows of gate and up move with its columns."""
    meant = write_gptq(tmp_path / "m", desc_act=True)
    gguf, receipt = repacked(tmp_path / "m")
    assert receipt["gathered_layers"] == 2
    assert receipt["types"] == {"q8_0": 12, "q4_0": 2}
    assert gguf.gguf.metadata[METHOD] == "gathered"
    layer = "model.layers.1.mlp"
    order = np.argsort(
        opened(tmp_path / "m").packed.read_part(f"{layer}.down_proj", "g_idx"), kind="stable"
    )
    down = meant[f"{layer}.down_proj.weight"][:, order]
    np.testing.assert_array_equal(rows(gguf, f"{layer}.down_proj.weight"), down)
    for kind in ("gate", "up"):
        weight = meant[f"{layer}.{kind}_proj.weight"][order]
        np.testing.assert_allclose(rows(gguf, f"{layer}.{kind}_proj.weight"), weight, atol=2e-3)
    gathered = opened(tmp_path / "m").gathered()  # what such a file is to be compared with
    np.testing.assert_array_equal(rows(gathered, f"{layer}.down_proj.weight"), down)


def test_asymmetric_8_bits_have_no_ggml_type(tmp_path):
    write_gptq(tmp_path / "m", bits=8, sym=False)
    _, receipt = repacked(tmp_path / "m")
    assert receipt["types"] == {"f16": 14}
    assert 0 < receipt["tensors"][0]["added_error"] < 3e-4


def test_scales_finer_than_f16_are_rounded_and_told(tmp_path):
    write_gptq(tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(".scales")]:
        tensors[name] = tensors[name].astype(np.float32) * np.float32(1.0001)
    save_file(tensors, file)
    name = "model.layers.0.mlp.up_proj.weight"
    gguf, receipt = repacked(tmp_path / "m")
    entry = next(t for t in receipt["tensors"] if t["name"] == gguf_name(name))
    off = np.abs(rows(gguf, name) - rows(opened(tmp_path / "m"), name)).max()
    assert 0 < off <= entry["largest_difference"] < 1e-3
    with pytest.raises(InputError, match="f16 rounds its minimums or scales"):
        repacked(tmp_path / "m", exact=True)


def test_exl2_becomes_a_dense_gguf(tmp_path):
    meant = write_exl2(tmp_path / "m")
    gguf, receipt = repacked(tmp_path / "m")
    assert receipt["types"] == {"f16": 15}
    for name, weight in meant.items():
        np.testing.assert_allclose(rows(gguf, name), weight, rtol=2**-11, atol=2**-25)
    gguf, receipt = repacked_again(tmp_path / "m", exact=True, to=F32)
    assert receipt["exact"]
    for name, weight in meant.items():
        np.testing.assert_array_equal(rows(gguf, name), weight)


@pytest.mark.parametrize("write", [write_gptq, write_exl2])
def test_a_dense_directory_has_the_same_weights(tmp_path, write):
    meant = write(tmp_path / "m")
    source = opened(tmp_path / "m")
    _, receipt = run_unpack(source, plan_unpack(source, exact=True), tmp_path / "f32", threads=2)
    assert receipt["exact"]
    dense = opened(tmp_path / "f32")
    assert dense.packed is None
    assert dense.spec.rope == source.spec.rope
    assert all(is_model_file(path.name) for path in (tmp_path / "f32").iterdir())
    for name, weight in meant.items():
        np.testing.assert_array_equal(rows(dense, name), weight)
    _, receipt = run_unpack(source, plan_unpack(source, "f16"), tmp_path / "f16", threads=2)
    assert 0 < receipt["largest_difference"] < 2e-4
    with pytest.raises(InputError, match="--outtype f16: rounds the weights"):
        plan_unpack(source, "f16", exact=True)


def test_what_is_refused(tmp_path):
    write_gptq(tmp_path / "m")
    checkpoint = opened(tmp_path / "m")
    with pytest.raises(InputError, match="is gptq already: quantizing it again to q4_k_m"):
        plan_gguf(checkpoint, PRESETS["q4_k_m"])
    plan_gguf(checkpoint, PRESETS["q4_k_m"], allow_requantize=True)
    with pytest.raises(InputError, match="choose auto, or f32, f16, bf16 or q8_0"):
        float_type("q4_k_m")
    assert float_type("Q8_0") is BY_NAME["q8_0"]
    run_unpack(checkpoint, plan_unpack(checkpoint), tmp_path / "dense", threads=2)
    with pytest.raises(InputError, match="neither GPTQ nor EXL2"):
        plan_repack(opened(tmp_path / "dense"))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gptq", {}),
        ("gptq", {"bits": 3, "sym": False}),
        ("gptq", {"desc_act": True}),
        ("exl2", {}),
    ],
)
def test_llama_cpp_computes_what_transformers_does(tmp_path, kind, settings):
    """Against transformers on the dequantized weights; llama.cpp rounds activations to 8 bits."""
    import torch
    from transformers import LlamaForCausalLM

    from dsq.runtime.llamacpp import LlamaCppEngine

    (write_gptq if kind == "gptq" else write_exl2)(tmp_path / "m", **settings)
    source = opened(tmp_path / "m")
    run_unpack(source, plan_unpack(source), tmp_path / "dense", threads=2)
    run_repack(plan_repack(source), tmp_path / "m.gguf", threads=2)
    ids = np.random.default_rng(3).integers(0, 4000, 300)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    with torch.inference_mode():
        theirs = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    with LlamaCppEngine(tmp_path / "m.gguf", n_ctx=len(ids), flash_attention=False) as engine:
        ours = engine.logits(ids.tolist()).copy()  # a view of the engine's memory
    cosine = (
        (ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)
    )
    assert cosine.min() > (0.9999 if kind == "exl2" else 0.999)
