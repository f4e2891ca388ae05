"""GPTQ's layout: against its definition bit by bit, and against GPTQModel's own packer."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsq.errors import InputError
from dsq.quant.gptq_layout import GPTQ_BITS, GptqTensor, pack, unpack


def linear(
    bits: int, n_in: int = 96, n_out: int = 32, groups: int = 3, seed: int = 0
) -> GptqTensor:
    """Random codes; every zero point occurs; g_idx in no order."""
    rng = np.random.default_rng(seed)
    return GptqTensor(
        rng.integers(0, 1 << bits, (n_in, n_out), dtype=np.uint8),
        rng.integers(0, 1 << bits, (groups, n_out), dtype=np.uint8),
        rng.uniform(0.001, 0.1, (groups, n_out)).astype(np.float16),
        rng.permutation(np.arange(n_in) * groups // n_in).astype(np.int32),
        bits,
    )


def stream(words: np.ndarray) -> int:
    """One column's words as one number, least significant word first."""
    return sum(int(word) << 32 * i for i, word in enumerate(words.view(np.uint32)))


@given(
    bits=st.sampled_from(GPTQ_BITS),
    n_in=st.integers(1, 5),
    n_out=st.integers(1, 3),
    groups=st.integers(1, 4),
    seed=st.integers(0, 2**32),
    checkpoint_format=st.sampled_from(["gptq", "gptq_v2"]),
)
def test_what_was_packed_comes_back(bits, n_in, n_out, groups, seed, checkpoint_format):
    tensor = linear(bits, 32 * n_in, 32 * n_out, groups, seed)
    back = unpack(pack(tensor, checkpoint_format), bits, checkpoint_format)
    for name in ("codes", "zeros", "scales", "g_idx"):
        np.testing.assert_array_equal(getattr(back, name), getattr(tensor, name))


@pytest.mark.parametrize("bits", GPTQ_BITS)
def test_each_column_is_one_little_endian_stream(bits):
    tensor = linear(bits)
    parts = pack(tensor, "gptq_v2")
    for column in (0, 1, 31):
        expected = sum(int(c) << bits * i for i, c in enumerate(tensor.codes[:, column]))
        assert stream(parts["qweight"][:, column]) == expected
    expected = sum(int(z) << bits * i for i, z in enumerate(tensor.zeros[1]))
    assert stream(parts["qzeros"][1]) == expected


def test_format_gptq_stores_a_zero_less_one_and_wraps():
    tensor = linear(4, n_out=8)
    tensor.zeros[:] = 8
    tensor.zeros[0, 1] = 0
    assert pack(tensor, "gptq")["qzeros"].view(np.uint32).ravel().tolist() == [
        0x777777F7,
        0x77777777,
        0x77777777,
    ]
    assert pack(tensor, "gptq_v2")["qzeros"].view(np.uint32)[0, 0] == 0x88888808


def test_gptqmodels_zeros_borrow_from_their_neighbours():
    """GPTQModel subtracts one from each field of a word at once: 0 takes 1 from the next field."""
    tensor = linear(4, n_out=8)
    tensor.zeros[:] = 8
    tensor.zeros[0, 1] = 0
    parts = pack(tensor, "gptq")
    parts["qzeros"][0, 0] -= 0x100
    assert unpack(parts, 4, "gptq").zeros[0, :4].tolist() == [8, 0, 7, 8]
    assert unpack(parts, 4, "gptq", borrow=True).zeros[0, :4].tolist() == [8, 0, 8, 8]


def test_dequantized_weights_are_exact():
    tensor = linear(3)
    weights = tensor.dequantized()
    assert weights.shape == (32, 96)
    for o, i in ((0, 0), (5, 17), (31, 95)):
        group = tensor.g_idx[i]
        code, zero = int(tensor.codes[i, o]), int(tensor.zeros[group, o])
        assert float(weights[o, i]) == (code - zero) * float(tensor.scales[group, o])


@pytest.mark.parametrize(
    ("bits", "n_in", "n_out", "said"),
    [
        (3, 40, 32, "40 inputs cannot be packed at 3 bits: GPTQ wants multiples of 32"),
        (2, 16, 24, "24 outputs cannot be packed at 2 bits: GPTQ wants multiples of 16"),
        (5, 32, 32, "GPTQ has 2, 3, 4, 8 bits, not 5"),
    ],
)
def test_shapes_that_cannot_be_packed(bits, n_in, n_out, said):
    with pytest.raises(InputError, match=said):
        pack(linear(bits, n_in, n_out, 1))


def test_what_does_not_fit_is_refused():
    tensor = linear(4)
    tensor.codes[3, 3] = 16
    with pytest.raises(InputError, match="a code of 16 does not fit into 4 bits"):
        pack(tensor)
    tensor = linear(2)
    tensor.zeros[0, 0] = 4
    with pytest.raises(InputError, match="a zero point of 4 does not fit into 2 bits"):
        pack(tensor)
    parts = pack(linear(4))
    parts["g_idx"][5] = 3
    with pytest.raises(InputError, match="g_idx goes from 0 to 3, but there are 3 groups"):
        unpack(parts, 4)
    parts["g_idx"][5] = -1
    with pytest.raises(InputError, match="g_idx goes from -1"):
        unpack(parts, 4)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gptqmodel") is None, reason="gptqmodel is not installed")
def test_gptqmodel_packs_the_same_words(tmp_path: Path):
    tensors = {f"b{bits}": linear(bits, 128, 64, 4, seed=bits) for bits in GPTQ_BITS}
    given = {
        f"{name}.{part}": np.asarray(getattr(tensor, part))
        for name, tensor in tensors.items()
        for part in ("bits", "codes", "zeros", "scales", "g_idx")
    }
    np.savez(tmp_path / "in.npz", **given)
    script = Path(__file__).with_name("gptqmodel_pack.py")
    files = [str(tmp_path / name) for name in ("in.npz", "out.npz")]
    done = subprocess.run(
        [sys.executable, str(script), *files],
        cwd=tmp_path,  # gptqmodel leaves logs where it runs
        env={**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    theirs = np.load(tmp_path / "out.npz")
    for name, tensor in tensors.items():
        for part, words in pack(tensor, "gptq_v2").items():
            np.testing.assert_array_equal(words, theirs[f"{name}.v2.{part}"], err_msg=name + part)
        v1 = {
            part: theirs[f"{name}.v1.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")
        }
        back = unpack(v1, tensor.bits, "gptq", borrow=True)
        np.testing.assert_array_equal(back.zeros, tensor.zeros)
        # GPTQModel multiplies in f16 by itself
        np.testing.assert_allclose(
            tensor.dequantized(), theirs[f"{name}.weight"], rtol=2**-11, atol=2**-24
        )
