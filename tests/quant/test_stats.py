"""The statistics file: plain safetensors, resumable, refused for another model."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from dsq.errors import DsqError, InputError
from dsq.quant.stats import (
    StatsWriter,
    input_of,
    input_sizes,
    is_stats,
    output_sizes,
    read_stats,
)

MODEL = {
    "n_layer": 2,
    "n_embd": 8,
    "n_ff": 12,
    "n_head": 2,
    "n_head_kv": 1,
    "head_dim": 3,
    "n_vocab": 20,
    "norms": "aa",
    "weights": "bb",
    "quantized": False,
}
TOKENS = np.arange(12, dtype=np.int32).reshape(3, 4)


def values(n, seed):
    return np.random.default_rng(seed).random(n, dtype=np.float32)


def fill(writer, names, *, hessians=True):
    sizes = input_sizes(MODEL)
    for i, name in enumerate(sizes):
        if name in names:
            n = sizes[name]
            hessian = values((n, n), 100 + i) if hessians else None
            writer.put_input(name, values(n, i), hessian)


def writer(path, **more):
    how = {"hessians": True, "record": {"seed": 3}, **more}
    return StatsWriter(path, model=MODEL, n_ctx=4, tokens=TOKENS, **how)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "stats.safetensors"
    with writer(path, gradients=True) as out:
        fill(out, input_sizes(MODEL))
        for i, (name, n) in enumerate(output_sizes(MODEL).items()):
            out.put_gradient(name, values(n, 50 + i))
    return path


def test_what_was_put_comes_back(file):
    stats = read_stats(file)
    assert stats.model == MODEL
    assert stats.record == {"seed": 3}
    np.testing.assert_array_equal(stats.tokens, TOKENS)
    for i, (name, n) in enumerate(input_sizes(MODEL).items()):
        found = stats.inputs[name]
        assert found.count == 12
        np.testing.assert_array_equal(found.mean_sq, values(n, i))
        np.testing.assert_array_equal(found.hessian, values((n, n), 100 + i))
    for i, (name, n) in enumerate(output_sizes(MODEL).items()):
        np.testing.assert_array_equal(stats.gradients[name], values(n, 50 + i))


def test_the_safetensors_library_reads_it(file):
    tensors = load_file(file)
    np.testing.assert_array_equal(tensors["tokens"], TOKENS)
    assert tensors["blk.1.ffn_out.hessian"].shape == (12, 12)
    assert tensors["blk.0.attn_k.weight.grad_sq"].shape == (3,)
    assert len(tensors) == 1 + 2 * 9 + 15


def test_without_hessians_and_gradients_there_are_none(tmp_path):
    with writer(tmp_path / "s", hessians=False) as out:
        fill(out, input_sizes(MODEL), hessians=False)
    stats = read_stats(tmp_path / "s")
    assert not stats.has_hessians
    assert stats.inputs["blk.1.ffn_out"].hessian is None
    assert not stats.gradients


def test_a_file_written_in_two_goes_is_the_same(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    with writer(one) as out:
        fill(out, input_sizes(MODEL))
    first = set(list(input_sizes(MODEL))[:4])
    with writer(two) as out:
        fill(out, first)
    with writer(two) as out:
        fill(out, set(input_sizes(MODEL)) - first)
    assert one.read_bytes() == two.read_bytes()


def test_a_file_of_other_contents_is_begun_anew(tmp_path):
    with writer(tmp_path / "s", record={"seed": 4}) as out:
        fill(out, input_sizes(MODEL))
    with writer(tmp_path / "s"):
        pass
    assert not read_stats(tmp_path / "s").inputs["output"].mean_sq.any()


def test_a_full_disk_is_told_before_the_work(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        writer(tmp_path / "s")


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("blk.3.attn_q.weight", "blk.3.attn_in"),
        ("blk.3.attn_v.weight", "blk.3.attn_in"),
        ("blk.0.attn_output.weight", "blk.0.attn_out"),
        ("blk.12.ffn_up.weight", "blk.12.ffn_in"),
        ("blk.3.ffn_down.weight", "blk.3.ffn_out"),
        ("output.weight", "output"),
    ],
)
def test_which_input_a_tensor_reads(name, source):
    assert input_of(name) == source


@pytest.mark.parametrize(
    "name", ["token_embd.weight", "blk.0.attn_norm.weight", "blk.0.attn_q.bias"]
)
def test_what_is_no_linear_reads_nothing(name):
    with pytest.raises(KeyError):
        input_of(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_ff": 16}, "another model: n_ff 12, not 16"),
        ({"norms": "cc"}, "a hash of its norms, aa, not cc"),
        ({"weights": "cc"}, "a hash of its weights, bb, not cc"),
    ],
)
def test_another_model_is_refused(file, change, message):
    read_stats(file).check_model(MODEL)
    with pytest.raises(InputError, match=message):
        read_stats(file).check_model({**MODEL, **change})


def test_a_quantized_file_of_the_model_is_accepted(file):
    read_stats(file).check_model({**MODEL, "quantized": True, "weights": "cc"})


def test_what_is_no_statistics_file(tmp_path, file):
    other = tmp_path / "other"
    with pytest.raises(InputError, match="cannot read the statistics: No such file"):
        read_stats(other)
    other.write_bytes(b"GGUF" + bytes(100))
    assert is_stats(file)
    assert not is_stats(other)
    with pytest.raises(InputError, match="no statistics file, or damaged"):
        read_stats(other)


def rewritten(file, change):
    """The file with its JSON about itself changed."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    about = json.loads(header["__metadata__"]["dsq_stats"])
    change(about)
    header["__metadata__"]["dsq_stats"] = json.dumps(about)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(version=2), "statistics of version 2, this dsq reads 1"),
        (lambda a: a.update(n_ctx="4"), "n_ctx is '4'; the file is damaged"),
        (lambda a: a.update(model=[]), "model is '\\[\\]'; the file is damaged"),
        (lambda a: a["model"].update(n_ff=13), r"ffn_out.mean_sq is F32 of shape \[12\]"),
        (lambda a: a["model"].update(n_layer=10**9), "n_layer is 1000000000"),
        (lambda a: a["model"].update(n_layer=3), "blk.2.attn_in.mean_sq is missing"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(file, change, message):
    with pytest.raises(InputError, match=message):
        read_stats(rewritten(file, change))


def test_nan_in_the_mean_squares_is_refused(tmp_path):
    with writer(tmp_path / "s") as out:
        fill(out, input_sizes(MODEL))
        out.put_input("blk.1.ffn_in", np.full(8, np.nan, np.float32))
    with pytest.raises(InputError, match=r"blk\.1\.ffn_in\.mean_sq has values that are NaN"):
        read_stats(tmp_path / "s")


def test_nan_in_a_hessian_is_refused_when_it_is_read(tmp_path):
    with writer(tmp_path / "s") as out:
        fill(out, input_sizes(MODEL))
        n = input_sizes(MODEL)["blk.1.ffn_in"]
        bad = np.eye(n, dtype=np.float32)
        bad[1, 2] = np.nan
        out.put_input("blk.1.ffn_in", np.ones(n, np.float32), bad)
    stats = read_stats(tmp_path / "s")
    assert stats.inputs["blk.0.ffn_in"].hessian is not None
    with pytest.raises(InputError, match=r"blk\.1\.ffn_in\.hessian has values that are NaN"):
        stats.inputs["blk.1.ffn_in"].hessian  # noqa: B018


@settings(max_examples=100, deadline=None, database=None)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "s"
    with writer(path, hessians=False) as out:
        fill(out, input_sizes(MODEL), hessians=False)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 2))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.just(len(raw)) | st.integers(0, len(raw)))])
    message = ""
    try:
        read_stats(path)
    except DsqError as error:
        message = str(error)
    assert "\n" not in message
