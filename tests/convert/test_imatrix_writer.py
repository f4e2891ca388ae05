"""Importance matrices written: llama.cpp's file, from statistics and from others' files."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.gguf.reader import read_gguf
from dsq.convert.identity import model_identity
from dsq.convert.imatrix import ImatrixSums, read_imatrix, read_sums, sums_of_stats
from dsq.convert.imatrix_writer import merge, summary, write_imatrix
from dsq.convert.pipeline import plan_gguf, run_gguf_plan
from dsq.errors import InputError
from dsq.quant.presets import PRESETS
from dsq.quant.stats import StatsWriter, input_sizes, read_stats
from tests.models import llama_config, write_hf
from tests.peer import llama_quantize

from .test_byte_identity import assert_same_tensors
from .test_imatrix import dat_bytes, write_gguf


def floats(*values):
    return np.array(values, np.float32)


def sums(path, values, counts, **more):
    how = {"datasets": ("a.txt",), "n_chunks": 3, "chunk_size": 512, **more}
    return ImatrixSums(path, values, counts, **how)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(write_hf(tmp_path_factory.mktemp("hf"), llama_config()))


@pytest.fixture(scope="module")
def stats(checkpoint, tmp_path_factory):
    """Random mean squares of that model, over a number of tokens that divides nothing evenly."""
    path = tmp_path_factory.mktemp("stats") / "stats.safetensors"
    rng = np.random.default_rng(5)
    model = model_identity(checkpoint)
    tokens = np.zeros((7, 99), np.int32)
    record = {"text": {"name": "code.txt"}}
    with StatsWriter(path, model=model, n_ctx=99, tokens=tokens, record=record) as writer:
        for name, n in input_sizes(model).items():
            writer.put_input(name, rng.random(n, dtype=np.float32) ** 4 + np.float32(1e-4))
    return path


def test_the_file_has_what_llama_cpp_reads(tmp_path, stats):
    """Keys and shapes of `common_imatrix_load`, by gguf's own reader."""
    write_imatrix(tmp_path / "i.gguf", sums_of_stats(read_stats(stats)))
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    keys = {name: f.contents() for name, f in reader.fields.items() if not name.startswith("GGUF.")}
    assert keys == {
        "general.type": "imatrix",
        "imatrix.datasets": ["code.txt"],
        "imatrix.chunk_count": 7,
        "imatrix.chunk_size": 99,
    }
    tensors = {t.name: t for t in reader.tensors}
    names = [t.name for t in reader.tensors]
    assert len(tensors) == 2 * 14  # 2 layers of 7; output.weight is not in it
    assert names[:2] == ["blk.0.attn_k.weight.in_sum2", "blk.0.attn_k.weight.counts"]
    assert all(t.tensor_type == gguf.GGMLQuantizationType.F32 for t in reader.tensors)
    mean_sq = read_stats(stats).inputs["blk.1.ffn_out"].mean_sq
    np.testing.assert_allclose(tensors["blk.1.ffn_down.weight.in_sum2"].data, mean_sq * 693)
    assert tensors["blk.1.ffn_down.weight.counts"].data.tolist() == [693]


def test_with_the_output_if_asked(stats):
    asked = sums_of_stats(read_stats(stats), output=True).sums
    assert set(asked) - set(sums_of_stats(read_stats(stats)).sums) == {"output.weight"}


@pytest.mark.parametrize("name", ["q4_0", "q3_k_m"])
def test_quantized_alike_with_ours_by_llama_cpp_and_from_the_statistics(
    tmp_path, checkpoint, stats, name
):
    write_imatrix(tmp_path / "i.gguf", sums_of_stats(read_stats(stats)))
    bf16 = tmp_path / "bf16.gguf"
    run_gguf_plan(checkpoint, plan_gguf(checkpoint, PRESETS["bf16"]), bf16)
    for out, imatrix in (("gguf", tmp_path / "i.gguf"), ("stats", stats)):
        plan = plan_gguf(checkpoint, PRESETS[name], imatrix=read_imatrix(imatrix))
        run_gguf_plan(checkpoint, plan, tmp_path / out)
    assert_same_tensors(tmp_path / "gguf", tmp_path / "stats")
    # What llama-quantize takes from the file: sums over counts (`load_imatrix` in quantize.cpp).
    read = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "i.gguf").tensors}
    means = {
        n.removesuffix(".in_sum2"): values / read[n.replace(".in_sum2", ".counts")]
        for n, values in read.items()
        if n.endswith(".in_sum2")
    }
    theirs = tmp_path / "theirs"
    assert llama_quantize(bf16, theirs, PRESETS[name].ftype, imatrix=means) is None
    assert_same_tensors(tmp_path / "gguf", theirs)


def test_statistics_of_another_model_are_refused(tmp_path, checkpoint, stats):
    assert read_imatrix(stats, checkpoint).n_chunks == 7
    other = open_checkpoint(write_hf(tmp_path / "hf", llama_config(), seed=1))
    with pytest.raises(InputError, match="statistics of another model: a hash of its norms"):
        read_imatrix(stats, other)


def test_a_file_read_and_written_is_the_same(tmp_path):
    rng = np.random.default_rng(0)
    values = {"w": rng.random(8, dtype=np.float32), "moe": rng.random(12, dtype=np.float32)}
    first = sums(tmp_path, values, {"w": floats(5), "moe": floats(1, 2, 0)})
    write_imatrix(tmp_path / "a", first)
    found = read_sums(tmp_path / "a")
    write_imatrix(tmp_path / "b", found)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    np.testing.assert_array_equal(found.counts["moe"], [1, 2, 0])
    assert read_gguf(tmp_path / "a").tensors["moe.in_sum2"].shape == (3, 4)


def test_merging_weighs_by_tokens(tmp_path):
    a = write_gguf(tmp_path / "a", {"w": [8, 2], "v": [6, 6]}, {"w": [2], "v": [2]})
    b = write_gguf(tmp_path / "b", {"w": [10, 40]}, {"w": [1024]}, datasets=["b.txt", "c.txt"])
    merged = merge([read_sums(a), read_sums(b)])
    np.testing.assert_allclose(merged.means().values["w"], floats(18, 42) / 1026)
    np.testing.assert_array_equal(merged.means().values["v"], [3, 3])
    assert merged.datasets == ("code.txt", "b.txt", "c.txt")
    assert merged.n_chunks == 2
    assert merge([read_sums(a)]).sums.keys() == {"w", "v"}


def test_what_cannot_be_merged(tmp_path):
    a = write_gguf(tmp_path / "a", {"w": [8, 2]}, {"w": [2]})
    b = write_gguf(tmp_path / "b", {"w": [8, 2, 3]}, {"w": [2]})
    with pytest.raises(InputError, match="b: w has 3 values where .*a has 2"):
        merge([read_sums(a), read_sums(b)])
    (tmp_path / "old.dat").write_bytes(dat_bytes([("w", 2, [1, 2])]))
    with pytest.raises(InputError, match=r"an old \.dat counts calls"):
        read_sums(tmp_path / "old.dat")


def test_summary_is_in_the_models_order():
    values = {f"blk.{i}.ffn_up.weight": floats(1, 3) for i in (10, 2)}
    rows = summary(sums("i", values, dict.fromkeys(values, floats(2))))
    assert [row["tensor"] for row in rows] == ["blk.2.ffn_up.weight", "blk.10.ffn_up.weight"]
    assert rows[0]["total"] == 2.0
    assert rows[0]["largest_share"] == 0.75
