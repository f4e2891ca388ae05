"""The GGUF that is written: read by gguf-py and gguf-dump, whole or in shards."""

from __future__ import annotations

import subprocess
import sys

import gguf
import numpy as np
import pytest

from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.gguf.metadata import size_label
from dsq.convert.gguf.reader import read_gguf
from dsq.convert.pipeline import plan_gguf, run_gguf_plan
from dsq.errors import InputError, UnsupportedError
from dsq.quant.presets import PRESETS
from tests.models import TINY_CODER, llama_config, write_hf


def make(source, out, preset="bf16", *, force=False, **more):
    checkpoint = open_checkpoint(source)
    plan = plan_gguf(checkpoint, PRESETS[preset], **more)
    return plan, run_gguf_plan(checkpoint, plan, out, force=force)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny") / "tiny-coder.gguf"
    plan, artifact = make(TINY_CODER, out)
    return out, plan, artifact


def test_gguf_py_reads_what_was_planned(tiny):
    out, plan, artifact = tiny
    reader = gguf.GGUFReader(out)
    assert [t.name for t in reader.tensors] == [s.name for s in plan.steps]
    for tensor, step in zip(reader.tensors, plan.steps, strict=True):
        assert tensor.tensor_type == step.to.id
        assert tuple(reversed(tensor.shape.tolist())) == step.shape
    assert artifact.size_bytes == out.stat().st_size
    assert 0 <= artifact.size_bytes - plan.layout.data_bytes - reader.data_offset < 1


def test_the_rope_factor_and_the_fim_tokens_are_there(tiny):
    metadata = read_gguf(tiny[0]).metadata
    assert metadata["llama.rope.freq_base"] == 100000
    assert metadata["llama.rope.scaling.type"] == "linear"
    assert metadata["llama.rope.scaling.factor"] == 4
    assert metadata["tokenizer.ggml.pre"] == "deepseek-coder"
    tokens = metadata["tokenizer.ggml.tokens"]
    fim = [metadata[f"tokenizer.ggml.fim_{part}_token_id"] for part in ("pre", "suf", "mid")]
    names = ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"]
    assert [tokens[i] for i in fim] == names
    assert metadata["tokenizer.huggingface.json"] == (TINY_CODER / "tokenizer.json").read_text()


def test_gguf_dump_shows_nothing_odd(tiny):
    done = subprocess.run(
        [sys.executable, "-m", "gguf.scripts.gguf_dump", tiny[0]],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "WARNING" not in done.stdout + done.stderr
    assert "ERROR" not in done.stdout + done.stderr
    assert "llama.rope.scaling.factor = 4.0" in done.stdout


def test_shards_are_llama_cpps(tiny, tmp_path):
    _, artifact = make(TINY_CODER, tmp_path / "m.gguf", split_max_bytes=3 << 20)
    assert len(artifact.paths) > 2
    assert artifact.paths[0].name == f"m-00001-of-{len(artifact.paths):05d}.gguf"
    whole, split = read_gguf(tiny[0]), read_gguf(artifact.paths[0])
    assert list(whole.tensors) == list(split.tensors)
    for name in whole.tensors:
        np.testing.assert_array_equal(whole.data(name), split.data(name))


def test_llama_cpp_loads_the_shards(tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    _, artifact = make(TINY_CODER, tmp_path / "m.gguf", "q8_0", split_max_bytes=2 << 20)
    model = llama_cpp.llama_model_load_from_file(
        str(artifact.paths[0]).encode(), llama_cpp.llama_model_default_params()
    )
    assert model
    assert llama_cpp.llama_model_n_params(model) > 4_000_000
    llama_cpp.llama_model_free(model)


def test_a_shard_of_one_model_can_be_quantized(tmp_path):
    _, artifact = make(TINY_CODER, tmp_path / "m.gguf", split_max_bytes=3 << 20)
    make(artifact.paths[0], tmp_path / "q8.gguf", "q8_0")
    make(TINY_CODER, tmp_path / "direct.gguf", "q8_0")
    a, b = read_gguf(tmp_path / "q8.gguf"), read_gguf(tmp_path / "direct.gguf")
    assert "split.count" not in a.metadata
    for name in b.tensors:
        np.testing.assert_array_equal(a.data(name), b.data(name))


def test_the_source_is_never_overwritten(tiny):
    before = tiny[0].read_bytes()
    with pytest.raises(InputError, match="is the source itself"):
        make(tiny[0], tiny[0], "q8_0", force=True)
    assert tiny[0].read_bytes() == before


def test_llama3_scaling_becomes_a_tensor(tmp_path):
    config = llama_config(
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    )
    make(write_hf(tmp_path / "hf", config), tmp_path / "m.gguf")
    gguf_file = read_gguf(tmp_path / "m.gguf")
    factors = gguf_file.data("rope_freqs.weight").view(np.float32)
    assert factors.shape == (32,)
    assert factors[0] == 1
    assert factors[-1] == 8
    assert "llama.rope.scaling.type" not in gguf_file.metadata


@pytest.mark.parametrize(
    "n", [134_515_008, 1_346_471_936, 6_740_512_768, 33_342_991_360, 5_700_000]
)
def test_size_labels_are_gguf_pys(n):
    assert size_label(n) == gguf.size_label(n, n, 0, 0)


def test_yarn_betas_that_llama_cpp_would_ignore_are_refused(tmp_path):
    scaling = {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16,
    }
    source = write_hf(tmp_path / "hf", llama_config(rope_scaling=scaling))
    with pytest.raises(UnsupportedError, match="beta_fast 16"):
        make(source, tmp_path / "m.gguf")
