"""EXL2's layout, against its definition (`exl2_reference.py` reads it by the CUDA sources)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsq.errors import InputError
from dsq.quant.exl2_layout import EXL2_BITS, Exl2Tensor, pack, scale_values, unpack


def linear(groups: list[tuple[int, int]], n_out: int = 40, seed: int = 0) -> Exl2Tensor:
    """Random codes in groups of (bits, rows)."""
    rng = np.random.default_rng(seed)
    codes = [rng.integers(0, 1 << bits, (rows, n_out), dtype=np.uint8) for bits, rows in groups]
    n_in = sum(rows for _, rows in groups)
    return Exl2Tensor(
        np.concatenate(codes),
        np.array([bits for bits, _ in groups]),
        np.array([rows for _, rows in groups]),
        rng.integers(0, 16, (len(groups), n_out), dtype=np.uint8),
        rng.uniform(0.001, 0.5, len(groups)).astype(np.float16),
        rng.permutation(n_in).astype(np.int32),
    )


MIXED = [(8, 32), (6, 64), (5, 32), (4, 64), (3, 32), (2, 48), (2, 8)]  # the last one is ragged


def stream(words: np.ndarray) -> int:
    """One column's words as one number, least significant word first."""
    return sum(int(word) << 32 * i for i, word in enumerate(words.view(np.uint32)))


@given(
    groups=st.lists(st.tuples(st.sampled_from(EXL2_BITS), st.sampled_from([32, 64])), min_size=1),
    last=st.integers(1, 32),
    n_out=st.integers(1, 70),
    seed=st.integers(0, 2**32),
)
def test_what_was_packed_comes_back(groups, last, n_out, seed):
    groups = sorted(groups, reverse=True)
    groups[-1] = (groups[-1][0], last)
    tensor = linear(groups, n_out, seed)
    parts = pack(tensor)
    assert parts["q_weight"].shape[1] == -(-n_out // 32) * 32
    back = unpack(parts, n_out)
    for name in ("codes", "group_bits", "group_rows", "scale_codes", "scale_max", "invperm"):
        np.testing.assert_array_equal(getattr(back, name), getattr(tensor, name))


def test_each_column_of_a_group_is_one_little_endian_stream():
    tensor = linear(MIXED)
    parts = pack(tensor)
    starts = parts["q_groups"].reshape(-1, 2)
    assert starts[:, 0].tolist() == [bits for bits, _ in MIXED]
    assert starts[:, 1].tolist() == [0, 8, 20, 25, 33, 36, 39]  # Σ rows · bits / 32
    row = 0
    for g, (bits, rows) in enumerate(MIXED):
        stop = starts[g + 1, 1] if g + 1 < len(MIXED) else len(parts["q_weight"])
        words = parts["q_weight"][starts[g, 1] : stop]
        for column in (0, 39):
            codes = tensor.codes[row : row + rows, column]
            assert stream(words[:, column]) == sum(int(c) << bits * i for i, c in enumerate(codes))
        row += rows


def test_scales_lie_eight_to_a_word_along_the_columns():
    tensor = linear(MIXED)
    q_scale = pack(tensor)["q_scale"].view(np.uint32)
    assert q_scale.shape == (len(MIXED), 64 // 8)
    assert stream(q_scale[2])  & ((1 << 160) - 1) == sum(
        int(c) << 4 * i for i, c in enumerate(tensor.scale_codes[2])
    )  # fmt: skip


def test_padding_columns_weigh_nothing():
    whole = unpack(pack(linear(MIXED)))
    assert whole.codes.shape[1] == 64
    assert not whole.dequantized()[40:].any()


def test_a_scale_is_what_exllamav2_multiplies_with():
    """In f16 step by step, subnormal numbers included: 1e-3 / 256 has six bits left."""
    codes = np.arange(16, dtype=np.uint8)
    for largest in (0.5, 1e-3):
        maximum = np.float16(np.float16(largest) / 256)
        expected = [np.float16(np.float16((c + 1) ** 2) * maximum) for c in range(16)]
        got = scale_values(codes, np.full(16, largest, dtype=np.float16))
        assert got.tolist() == [float(value) for value in expected]


def test_dequantized_weights():
    tensor = linear(MIXED)
    weights, scales = tensor.dequantized(), tensor.scales()
    assert weights.shape == (40, 280)
    group_of = np.repeat(np.arange(len(MIXED)), [rows for _, rows in MIXED])
    for o, i in ((0, 0), (7, 100), (39, 279)):
        row = tensor.invperm[i]
        g = group_of[row]
        zero = 1 << (MIXED[g][0] - 1)
        assert weights[o, i] == (int(tensor.codes[row, o]) - zero) * scales[g, o]


def test_tensors_that_cannot_be_packed():
    with pytest.raises(InputError, match="EXL2 has 2, 3, 4, 5, 6, 8 bits, not 7"):
        pack(linear([(7, 32)]))
    with pytest.raises(InputError, match="bits grow"):
        pack(linear([(2, 32), (4, 32)]))
    with pytest.raises(InputError, match="16 rows at 3 bits does not fill whole words: 32 rows"):
        pack(linear([(3, 16), (3, 32)]))
    tensor = linear([(3, 32)])
    tensor.codes[0, 0] = 8
    with pytest.raises(InputError, match="a code of 8 does not fit into 3 bits"):
        pack(tensor)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p["q_invperm"].__setitem__(0, p["q_invperm"][1]), "no permutation of 280 rows"),
        (lambda p: p["q_invperm"].__setitem__(0, 280), "no permutation of 280 rows"),
        (lambda p: p["q_groups"].__setitem__(0, 7), "not 7"),
        (lambda p: p["q_groups"].__setitem__(3, 0), "begin at the packed rows"),
        (lambda p: p["q_groups"].__setitem__(5, 24), "groups have|does not fill whole words"),
        (lambda p: p.update(q_weight=p["q_weight"][:-1]), "q_weight has 39 packed rows|begin at"),
        (lambda p: p.update(q_scale=p["q_scale"][:-1]), r"q_scale is \[6, 8\], not \[7, 8\]"),
        (lambda p: p.update(q_weight=p["q_weight"][:, :-1]), "q_weight has 63 columns"),
    ],
)  # fmt: skip
def test_damage_is_noticed(change, said):
    parts = pack(linear(MIXED))
    change(parts)
    with pytest.raises(InputError, match=said):
        unpack(parts, 40)
