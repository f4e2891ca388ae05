"""Reading GPTQ and EXL2 directories: as dense checkpoints, whoever wrote them; and damage."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsq.convert.checkpoint import HfCheckpoint, open_checkpoint
from dsq.convert.pipeline import source_files
from dsq.errors import InputError, UnsupportedError
from dsq.quant import ggml
from tests.models import ROOT, llama_config, write_hf
from tests.packed_models import (
    gptq_config,
    gptq_rounded,
    is_linear,
    write_exl2,
    write_gptq,
    write_packed,
)

UP = "model.layers.0.mlp.up_proj"


def opened(path: Path) -> HfCheckpoint:
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, HfCheckpoint)
    return checkpoint


def weights_of(checkpoint: HfCheckpoint, name: str) -> np.ndarray:
    info = checkpoint.tensors[name]
    rows = ggml.dequantize(checkpoint.data(name), info.type, info.shape[-1])
    return rows.reshape(info.shape)


def check_weights(path: Path, meant: dict[str, np.ndarray]) -> HfCheckpoint:
    checkpoint = opened(path)
    assert checkpoint.tensors.keys() == meant.keys()
    for name, weight in meant.items():
        np.testing.assert_array_equal(weights_of(checkpoint, name), weight, err_msg=name)
    return checkpoint


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_gptq_reads_as_a_dense_checkpoint(tmp_path, bits, checkpoint_format):
    meant = write_gptq(
        tmp_path / "m", bits=bits, sym=False, desc_act=True, checkpoint_format=checkpoint_format
    )
    checkpoint = check_weights(tmp_path / "m", meant)
    tensor = checkpoint.codes(f"{UP}.weight")
    assert tensor is not None
    np.testing.assert_array_equal(tensor.dequantized(), meant[f"{UP}.weight"])
    assert checkpoint.codes("model.norm.weight") is None


def test_one_group_for_all_inputs(tmp_path):
    check_weights(tmp_path / "m", write_gptq(tmp_path / "m", group_size=-1))


@pytest.mark.parametrize("heads", [4, 1])
def test_exl2_reads_as_a_dense_checkpoint(tmp_path, heads):
    """The vocabulary is no multiple of 32, and with one KV head neither need k and v be."""
    config = llama_config(num_key_value_heads=heads, head_dim=24, num_attention_heads=8)
    config["vocab_size"] += 5
    meant = write_exl2(tmp_path / "m", config={**config, "torch_dtype": "float16"})
    check_weights(tmp_path / "m", meant)


def test_exl2_groups_whose_weights_are_all_0(tmp_path):
    meant = write_exl2(tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    tensors[f"{UP}.q_scale_max"][0] = 0  # as exllamav2 writes it for such a group
    save_file(tensors, tmp_path / "m/model.safetensors")
    weight = meant[f"{UP}.weight"]
    weight[:, tensors[f"{UP}.q_invperm"] < 32] = 0  # the first group has 32 rows
    check_weights(tmp_path / "m", meant)


def test_a_packed_head_ends_the_tie(tmp_path):
    meant = write_exl2(tmp_path / "m", config=llama_config())
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert not check_weights(tmp_path / "m", meant).spec.tied


def test_exllamav2s_own_file_names(tmp_path):
    """output.safetensors, beside the index of the model that it started from."""
    meant = write_exl2(tmp_path / "m", file="output.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps(index))
    check_weights(tmp_path / "m", meant)
    tensors = load_file(tmp_path / "m/output.safetensors")
    for name in [name for name in tensors if name.endswith(".q_invperm")]:  # old files have both
        order = np.argsort(tensors[name]).astype(np.int32)
        tensors[name.replace("q_invperm", "q_perm")] = order
    names = sorted(tensors)
    (tmp_path / "m/output.safetensors").unlink()
    for i, half in enumerate((names[::2], names[1::2]), 1):
        save_file(
            {n: tensors[n] for n in half}, tmp_path / f"m/output-0000{i}-of-00002.safetensors"
        )
    checkpoint = check_weights(tmp_path / "m", meant)
    assert len(source_files(checkpoint)) == 2
    (tmp_path / "m/output-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="output-00002-of-00002.safetensors: missing"):
        open_checkpoint(tmp_path / "m")


def test_autogptqs_old_directories(tmp_path):
    """quantize_config.json alone, its own file name, and biases of zeros for every linear."""
    folder = tmp_path / "m"
    meant = write_gptq(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for name, weight in meant.items():
        if is_linear(name):
            bias = np.zeros(len(weight), dtype=np.float16)
            tensors[name.replace(".weight", ".bias")] = bias
    save_file(tensors, folder / "gptq_model-4bit-64g.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    said = {"bits": 4, "group_size": 64, "damp_percent": 0.01, "desc_act": False, "sym": True}
    (folder / "quantize_config.json").write_text(json.dumps({**said, "model_file_base_name": None}))
    check_weights(folder, meant)
    tensors[f"{UP}.bias"][3] = 1
    save_file(tensors, folder / "gptq_model-4bit-64g.safetensors")
    with pytest.raises(InputError, match=f"{UP}.bias' is none of a Llama"):
        open_checkpoint(folder)


def test_gptqmodels_dynamic_settings(tmp_path):
    dynamic = {
        r"-:model\.layers\.1\.self_attn": {},
        r"+:.*\.down_proj": {"bits": 8, "group_size": 32},
        r".*\.gate_proj": {"bits": 3},
    }

    def quantize(name: str, weight: np.ndarray) -> Any:
        if not is_linear(name) or "1.self_attn" in name:
            return None
        bits, size = (8, 32) if "down" in name else (3, 64) if "gate" in name else (4, 64)
        return gptq_rounded(weight, bits, size)

    said = gptq_config(dynamic=dynamic, checkpoint_format="gptq_v2")
    meant = write_packed(tmp_path / "m", quantize, said)
    checkpoint = check_weights(tmp_path / "m", meant)
    assert checkpoint.packed is not None
    assert checkpoint.packed.kind("model.layers.1.mlp.down_proj.weight") == "gptq 8-bit"
    del said["dynamic"]
    write_packed(tmp_path / "m", quantize, said)
    with pytest.raises(
        InputError, match="which is 8 bits; config.json: quantization_config says 4"
    ):
        open_checkpoint(tmp_path / "m")


def test_gptqmodels_borrowed_zeros(tmp_path):
    """A zero point of 0 in a file of GPTQModel takes its one from the next: see the layout."""
    folder = tmp_path / "m"
    meta = {"quantizer": ["gptqmodel:7.6.0"]}
    write_gptq(folder, sym=False, meta=meta)
    tensors = load_file(folder / "model.safetensors")
    zeros = tensors[f"{UP}.qzeros"]
    zeros[0, 0] = 0x76543210 - 0x11111111
    save_file(tensors, folder / "model.safetensors")
    tensor = opened(folder).codes(f"{UP}.weight")
    assert tensor.zeros[0, :8].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_what_a_matrix_takes_in_the_files(tmp_path):
    write_gptq(tmp_path / "m")
    checkpoint = opened(tmp_path / "m")
    # 512 × 256 codes of 4 bits; 4 groups of f16 scales and 4-bit zeros; g_idx
    stored = 512 * 256 // 2 + 4 * 512 * 2 + 4 * 512 // 2 + 4 * 256
    assert checkpoint.stored_as(f"{UP}.weight") == ("gptq 4-bit", stored)
    assert checkpoint.stored_as("model.norm.weight") == ("f16", 512)


Change = Callable[[dict[str, np.ndarray]], None]


def set_scale(value: float) -> Change:
    return lambda t: t[f"{UP}.scales"].__setitem__((0, 5), value)


GPTQ_DAMAGE: dict[str, tuple[Change, str]] = {
    "a tensor is missing": (lambda t: t.pop(f"{UP}.qzeros"), f"'{UP}.qzeros' is missing"),
    "a linear is missing": (
        lambda t: [t.pop(f"{UP}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")],
        f"tensor '{UP}.weight' is missing",
    ),
    "one too many": (lambda t: t.update({"x.weight": np.zeros(3, "f2")}), "'x.weight' is none"),
    "packed and dense": (
        lambda t: t.update({f"{UP}.weight": np.zeros((512, 256), np.float16)}),
        "packed and dense",
    ),
    "other bits": (
        lambda t: t.update({f"{UP}.qweight": np.zeros((64, 512), np.int32)}),
        "64 rows for 256 inputs, which is 8 bits; config.json: quantization_config says 4",
    ),
    "other groups": (
        lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"][:-1]}),
        "3 groups; 256 inputs in groups of 64 make 4",
    ),
    "short zeros": (
        lambda t: t.update({f"{UP}.qzeros": t[f"{UP}.qzeros"][:, :-1].copy()}),
        r"qzeros has shape \[4, 63\]; expected \[4, 64\]",
    ),
    "another type": (
        lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].view(np.int16)}),
        "qweight' is i16 of shape",
    ),
    "norm of integers": (
        lambda t: t.update({"model.norm.weight": np.zeros(256, np.int32)}),
        "'model.norm.weight' of type i32 is none of a gptq checkpoint",
    ),
    "g_idx out of range": (lambda t: t[f"{UP}.g_idx"].__setitem__(0, 4), "g_idx goes from 0 to 4"),
    "NaN": (set_scale(np.nan), f"{UP}: 1 of 2048 scales are NaN or Inf"),
    "zero scale": (set_scale(0), f"{UP}: 1 of 2048 scales are 0"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), GPTQ_DAMAGE.values(), ids=GPTQ_DAMAGE)
def test_damaged_gptq(tmp_path, change, said):
    write_gptq(tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "m/model.safetensors")
    with pytest.raises(InputError, match=said):
        opened(tmp_path / "m").data(f"{UP}.weight")


EXL2_DAMAGE: dict[str, tuple[Change, str]] = {
    "a tensor is missing": (lambda t: t.pop(f"{UP}.q_scale"), f"'{UP}.q_scale' is missing"),
    "no permutation": (
        lambda t: t[f"{UP}.q_invperm"].__setitem__(0, t[f"{UP}.q_invperm"][1]),
        f"{UP}: q_invperm is no permutation",
    ),
    "7 bits": (lambda t: t[f"{UP}.q_groups"].__setitem__(0, 7), f"{UP}: EXL2 has .* not 7"),
    "other outputs": (
        lambda t: t.update(
            {
                f"{UP}.q_weight": t[f"{UP}.q_weight"][:, :-32].copy(),
                f"{UP}.q_scale": t[f"{UP}.q_scale"][:, :-4].copy(),
            }
        ),
        r"has shape \[480, 256\]; the config asks for \[512, 256\]",
    ),
    "NaN": (lambda t: t[f"{UP}.q_scale_max"].__setitem__(0, np.nan), "1 of 5 q_scale_max are NaN"),
}


@pytest.mark.parametrize(("change", "said"), EXL2_DAMAGE.values(), ids=EXL2_DAMAGE)
def test_damaged_exl2(tmp_path, change, said):
    write_exl2(tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "m/model.safetensors")
    with pytest.raises(InputError, match=said):
        opened(tmp_path / "m").data(f"{UP}.weight")


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"bits": 3}, "config.json: quantization_config says bits 4, quantize_config.json says 3"),
        ({"group_size": 128}, "says group_size 64, quantize_config.json says 128"),
        ({"quant_method": "awq"}, "says quant_method 'gptq', quantize_config.json says 'awq'"),
        ({"sym": False}, "says sym True, quantize_config.json says False"),
    ],
)
def test_configs_that_disagree(tmp_path, beside, said):
    write_gptq(tmp_path / "m")
    settings = {"bits": 4, "group_size": 64, "sym": True, **beside}
    (tmp_path / "m/quantize_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=re.escape(said)):
        open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize("key", ["quant_method", "method"])
def test_another_method_in_the_file_beside_is_named(tmp_path, key):
    write_gptq(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    beside = {**config.pop("quantization_config"), "quant_method": None, key: "awq"}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    (tmp_path / "m/quantize_config.json").write_text(json.dumps(beside))
    with pytest.raises(UnsupportedError, match=r"quantize_config\.json: quantized by 'awq'"):
        open_checkpoint(tmp_path / "m")


def test_gptqmodels_newer_key_of_the_method(tmp_path):
    meant = write_gptq(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    said = config["quantization_config"]
    said["method"] = said.pop("quant_method")
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    check_weights(tmp_path / "m", meant)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"bits": 5}, UnsupportedError, "5 bits are not supported"),
        ({"bits": True}, InputError, "bits is True; expected an integer"),
        ({"bits": None}, InputError, "bits is None; expected an integer"),
        ({"checkpoint_format": "gptq_p"}, UnsupportedError, "gptq_p.* is not supported"),
        ({"dynamic": {"(": {}}}, InputError, "dynamic"),
        ({"dynamic": [1]}, InputError, "dynamic is"),
        ({"group_size": 0}, InputError, "groups of 0"),
        (
            {"quant_method": "awq"},
            UnsupportedError,
            r"already \(by 'awq'\).*gptq and exl2",
        ),
        (
            {"quant_method": None, "method": "fp8"},
            UnsupportedError,
            r"already \(by 'fp8'\).*give the",
        ),
        ({"quant_method": "bitsandbytes"}, UnsupportedError, r"\(by 'bitsandbytes'\)"),
        ({"quant_method": None, "load_in_4bit": True}, UnsupportedError, r"\(by bitsandbytes\)"),
        ({"quant_method": None}, UnsupportedError, "names no quant_method"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, changes, error, said):
    write_gptq(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["quantization_config"] |= changes
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=said):
        open_checkpoint(tmp_path / "m")


def test_a_dense_model_that_calls_itself_quantized(tmp_path):
    write_packed(tmp_path / "m", lambda name, weight: None, gptq_config())
    with pytest.raises(InputError, match="says gptq, but no tensor is packed"):
        open_checkpoint(tmp_path / "m")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gptqmodel") is None, reason="gptqmodel is not installed")
def test_what_gptqmodel_writes(tmp_path):
    """Asymmetric, act-order, one module left dense, down_proj at 8 bits: as it reads it back."""
    write_hf(tmp_path / "src", llama_config(torch_dtype="float16"), dtype="F16")
    left, down = r"-:.*layers\.1\.self_attn\.v_proj", r".*down_proj"
    dynamic = {left: {}, down: {"bits": 8, "group_size": 32}}
    settings = {"bits": 4, "group_size": 64, "sym": False, "desc_act": True, "dynamic": dynamic}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    script = Path(__file__).with_name("gptqmodel_quantize.py")
    done = subprocess.run(
        [sys.executable, str(script), "src", "out", "settings.json", str(ROOT / "README.md")],
        cwd=tmp_path,
        env={**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    checkpoint = opened(tmp_path / "out")
    assert checkpoint.packed is not None
    theirs = np.load(tmp_path / "out.npz")
    assert {f"{module}.weight" for module in theirs} == set(checkpoint.packed.tensors)
    assert len(theirs) == 13
    for module in theirs:  # it multiplies in f16
        ours = weights_of(checkpoint, f"{module}.weight")
        np.testing.assert_allclose(ours, theirs[module], rtol=2**-11, atol=2**-24)
