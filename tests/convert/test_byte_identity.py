"""The bytes are llama-quantize's: every preset, with an imatrix and without, and every flag.

The peer is `llama_model_quantize` of the installed llama.cpp. Its input is the f32 or bf16 GGUF
that dsq converts; test_against_converter.py holds that file to llama.cpp's own converter.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.gguf.reader import read_gguf
from dsq.convert.imatrix import Imatrix
from dsq.convert.pipeline import plan_gguf, run_gguf_plan
from dsq.errors import InputError
from dsq.quant.plan import Options
from dsq.quant.presets import PRESETS
from dsq.quant.scheme import BY_NAME
from tests.models import llama_config, write_hf
from tests.peer import llama_quantize


def make(source, out, preset, **more):
    checkpoint = open_checkpoint(source)
    run_gguf_plan(checkpoint, plan_gguf(checkpoint, PRESETS[preset], **more), out, force=True)
    return out


def imatrix_for(path, seed=7):
    """Positive weights for every matrix that a calibration would see (token_embd is not one)."""
    rng = np.random.default_rng(seed)
    values = {
        t.name: rng.random(t.n_per_row, dtype=np.float32) ** 4 + 1e-4
        for t in read_gguf(path).tensors.values()
        if len(t.shape) == 2 and t.name != "token_embd.weight"
    }
    return Imatrix(path, values)


def assert_same_tensors(ours, theirs):
    a, b = read_gguf(ours), read_gguf(theirs)
    assert list(a.tensors) == list(b.tensors)
    for name, tensor in a.tensors.items():
        assert tensor.type is b.tensors[name].type, name
        assert tensor.shape == b.tensors[name].shape, name
        np.testing.assert_array_equal(a.data(name), b.data(name), err_msg=name)


def small_config(**changes):
    """Rows of 256 fit K-quants; rows of 352 = 11 × 32 do not, nor do 1.3b's 5504 = 172 × 32."""
    shape = {
        "hidden_size": 256,
        "intermediate_size": 352,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
    }
    return llama_config(**{**shape, **changes})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Untied, multi-query, bf16, ragged ffn."""
    return write_hf(tmp_path_factory.mktemp("hf"), small_config())


@pytest.fixture(scope="module")
def f32(checkpoint, tmp_path_factory):
    return make(checkpoint, tmp_path_factory.mktemp("f32") / "f32.gguf", "f32")


@pytest.fixture(scope="module")
def bf16(checkpoint, tmp_path_factory):
    return make(checkpoint, tmp_path_factory.mktemp("bf16") / "bf16.gguf", "bf16")


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """For the low-bit types, whose search takes ggml up to 0.1 ms a weight."""
    config = small_config(num_hidden_layers=1, intermediate_size=96)
    source = write_hf(tmp_path_factory.mktemp("one"), config)
    return source, make(source, tmp_path_factory.mktemp("one_f32") / "f32.gguf", "f32")


REFUSALS = {
    "requires an imatrix": "needs an importance matrix",
    "Missing importance matrix": "needs an importance matrix",
    "no tensor type fallback is defined": "llama.cpp defines no fallback",
}


@pytest.mark.parametrize("with_imatrix", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("preset", PRESETS)
def test_one_pass_equals_convert_then_llama_quantize(
    checkpoint, f32, one_layer, tmp_path, preset, with_imatrix
):
    if preset.startswith(("iq1", "iq2", "iq3")):
        checkpoint, f32 = one_layer
    imatrix = imatrix_for(f32) if with_imatrix else None
    theirs = tmp_path / "theirs.gguf"
    refusal = llama_quantize(
        f32, theirs, PRESETS[preset].ftype, imatrix=imatrix.values if imatrix else None
    )
    if refusal:
        (reason,) = {ours for theirs, ours in REFUSALS.items() if theirs in refusal}
        with pytest.raises(InputError, match=reason):
            make(checkpoint, tmp_path / "ours.gguf", preset, imatrix=imatrix)
        return
    assert_same_tensors(make(checkpoint, tmp_path / "ours.gguf", preset, imatrix=imatrix), theirs)


@pytest.mark.parametrize("preset", ["q4_0", "q4_k_m", "q8_0", "f16"])
def test_a_bf16_intermediate_gives_the_same(checkpoint, bf16, tmp_path, preset):
    theirs = tmp_path / "theirs.gguf"
    assert llama_quantize(bf16, theirs, PRESETS[preset].ftype) is None
    assert_same_tensors(make(checkpoint, tmp_path / "ours.gguf", preset), theirs)
    assert_same_tensors(make(bf16, tmp_path / "from_gguf.gguf", preset), theirs)


FLAGS = {
    "pure": ({"pure": True}, Options(pure=True)),
    "leave output": ({"quantize_output_tensor": False}, Options(leave_output_tensor=True)),
    "output type": ({"output_tensor_type": 8}, Options(output_tensor_type=BY_NAME["q8_0"])),
    "embedding type": ({"token_embedding_type": 8}, Options(token_embedding_type=BY_NAME["q8_0"])),
    "tensor types": (
        {"tt_overrides": [("attn_v", 14), (r"blk\.1\.ffn_.*", 8), ("attn_v", 8)]},
        Options(
            tensor_types=(
                (re.compile("attn_v"), BY_NAME["q6_k"]),
                (re.compile(r"blk\.1\.ffn_.*"), BY_NAME["q8_0"]),
                (re.compile("attn_v"), BY_NAME["q8_0"]),
            )
        ),
    ),
}


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("preset", ["q4_k_m", "q4_0"])
def test_flags_mean_what_they_mean_to_llama_quantize(checkpoint, f32, tmp_path, preset, name):
    theirs_flags, options = FLAGS[name]
    theirs = tmp_path / "theirs.gguf"
    assert llama_quantize(f32, theirs, PRESETS[preset].ftype, **theirs_flags) is None
    assert_same_tensors(make(f32, tmp_path / "ours.gguf", preset, options=options), theirs)


def test_a_tied_model_quantizes_its_embedding_as_an_output(tmp_path):
    source = write_hf(tmp_path / "hf", small_config(tie_word_embeddings=True))
    f32 = make(source, tmp_path / "f32.gguf", "f32")
    for preset in ("q4_k_m", "q2_k", "iq4_xs"):
        theirs = tmp_path / "theirs.gguf"
        assert llama_quantize(f32, theirs, PRESETS[preset].ftype) is None
        assert_same_tensors(make(source, tmp_path / "ours.gguf", preset), theirs)


def test_requantizing_is_refused_unless_allowed(checkpoint, tmp_path):
    q8 = make(checkpoint, tmp_path / "q8.gguf", "q8_0")
    assert "requantizing from type q8_0 is disabled" in (
        llama_quantize(q8, tmp_path / "t.gguf", PRESETS["q4_0"].ftype) or ""
    )
    with pytest.raises(InputError, match="q8_0 already"):
        make(q8, tmp_path / "ours.gguf", "q4_0")
    theirs = tmp_path / "theirs.gguf"
    assert llama_quantize(q8, theirs, PRESETS["q4_0"].ftype, allow_requantize=True) is None
    assert_same_tensors(make(q8, tmp_path / "o.gguf", "q4_0", allow_requantize=True), theirs)


def test_an_imatrix_of_another_model_is_refused(f32, tmp_path):
    values = dict(imatrix_for(f32).values)
    values["blk.0.ffn_up.weight"] = np.ones(100, np.float32)
    with pytest.raises(InputError, match=r"100 values for blk\.0\.ffn_up\.weight"):
        make(f32, tmp_path / "ours.gguf", "q4_0", imatrix=Imatrix(f32, values))


@pytest.mark.parametrize(
    "shape",
    [
        {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3},
        {"intermediate_size": 5504},
    ],
    ids=["hidden 576 as SmolLM2", "ffn 5504 as DeepSeek Coder 1.3b"],
)
def test_rows_of_real_models(tmp_path, shape):
    source = write_hf(tmp_path / "hf", small_config(num_hidden_layers=1, **shape))
    f32 = make(source, tmp_path / "f32.gguf", "f32")
    for preset in ("q4_0", "q4_k_m", "q3_k_m", "q2_k"):
        theirs = tmp_path / "theirs.gguf"
        assert llama_quantize(f32, theirs, PRESETS[preset].ftype) is None
        assert_same_tensors(make(source, tmp_path / "ours.gguf", preset), theirs)
