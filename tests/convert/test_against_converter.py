"""llama.cpp's own converter, from the source tree that llama-cpp-python vendors, is the peer."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from dsq.cli.main import main
from dsq.convert.gguf.reader import read_gguf

pytestmark = pytest.mark.torch

# What dsq writes beyond llama.cpp's converter, and what it leaves to the defaults.
OURS_ONLY = {"tokenizer.ggml.eot_token_id", "tokenizer.huggingface.json"}
THEIRS_ONLY = {"llama.attention.key_length", "llama.attention.value_length"}  # the default here


@pytest.fixture(scope="module")
def smollm2_hf(smollm2_gguf, tmp_path_factory):
    """SmolLM2 as a Hugging Face checkpoint, off its old Q4_1 grid."""
    folder = tmp_path_factory.mktemp("smollm2") / "smollm2"
    args = ["--to", "hf", "--outtype", "bf16", "--dither", "0.3", "-o", str(folder)]
    assert main(["convert", str(smollm2_gguf), *args]) == 0
    return folder


@pytest.fixture(scope="module")
def theirs(smollm2_hf, llama_cpp_source, tmp_path_factory):
    out = tmp_path_factory.mktemp("theirs") / "theirs.gguf"
    environment = {**os.environ, "PYTHONPATH": str(llama_cpp_source / "gguf-py")}
    subprocess.run(
        [
            sys.executable,
            llama_cpp_source / "convert_hf_to_gguf.py",
            smollm2_hf,
            *("--outtype", "bf16", "--outfile", out),
        ],
        check=True,
        env=environment,
        capture_output=True,
    )
    return read_gguf(out)


@pytest.fixture(scope="module")
def ours(smollm2_hf, tmp_path_factory):
    out = tmp_path_factory.mktemp("ours") / "ours.gguf"
    assert main(["convert", str(smollm2_hf), "--to", "gguf", "-o", str(out)]) == 0
    return read_gguf(out)


def test_every_tensor_has_the_converters_bytes(ours, theirs):
    assert set(ours.tensors) == set(theirs.tensors)
    for name, tensor in ours.tensors.items():
        assert (tensor.type, tensor.shape) == (
            theirs.tensors[name].type,
            theirs.tensors[name].shape,
        )
        np.testing.assert_array_equal(ours.data(name), theirs.data(name), err_msg=name)


def test_every_key_is_the_converters(ours, theirs):
    assert set(ours.metadata) - set(theirs.metadata) == OURS_ONLY
    assert set(theirs.metadata) - set(ours.metadata) == THEIRS_ONLY
    for key in set(ours.metadata) & set(theirs.metadata):
        if key == "general.name":  # the folder's name; theirs in title case
            continue
        assert ours.metadata_types[key] == theirs.metadata_types[key], key
        np.testing.assert_array_equal(ours.metadata[key], theirs.metadata[key], err_msg=key)
