"""Drift statistics against a slow float64 computation of the same definitions."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsq.errors import DsqError
from dsq.quant.drift import Accumulator, PackedRows, for_blocks, mean_and_stderr, pack, percentile


def rows(n: int, n_vocab: int, seed: int = 0, spread: float = 3.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (spread * rng.standard_normal((n, n_vocab))).astype(np.float32)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def reference_statistics(logits: np.ndarray, ref: np.ndarray, targets: np.ndarray) -> dict:
    """Straight from perplexity.cpp, in float64 and without its 16-bit storage."""
    q, p = log_softmax(logits), log_softmax(ref)
    index = np.arange(len(targets))
    nll, ref_nll = -q[index, targets], -p[index, targets]
    kld = np.sort((np.exp(p) * (p - q)).sum(axis=1))
    same = float((logits.argmax(axis=1) == ref.argmax(axis=1)).mean())
    n = len(nll)

    def stderr(values: np.ndarray) -> float:
        return math.sqrt((np.mean(values**2) - np.mean(values) ** 2) / (n - 1))

    def at(fraction: float) -> float:
        where = fraction * (n - 1)
        i = int(where)
        return (1 - (where - i)) * kld[i] + (where - i) * kld[min(i + 1, n - 1)]

    dp = np.exp(-nll) - np.exp(-ref_nll)
    return {
        "tokens": n,
        "ppl": math.exp(nll.mean()),
        "ppl_stderr": math.exp(nll.mean()) * stderr(nll),
        "ref_ppl": math.exp(ref_nll.mean()),
        "kld_mean": kld.mean(),
        "kld_stderr": stderr(kld),
        "kld_median": np.median(kld),
        "kld_p99": at(0.99),
        "kld_p999": at(0.999),
        "kld_max": kld[-1],
        "top1_agreement": same,
        "top1_stderr": math.sqrt(same * (1 - same) / (n - 1)),
        "rms_dp": math.sqrt(np.mean(dp**2)),
    }


@pytest.mark.parametrize("packed", [False, True])
def test_every_statistic_equals_the_slow_computation(packed: bool) -> None:
    ref = rows(500, 307)
    logits = ref + rows(500, 307, seed=1, spread=0.2)
    targets = np.random.default_rng(2).integers(0, 307, 500)
    wanted = reference_statistics(logits, ref, targets)
    total = Accumulator()
    for part in (slice(0, 123), slice(123, 500)):  # in two portions
        given_ref = pack(ref[part].copy(), targets[part]) if packed else ref[part]
        total.add(logits[part].copy(), targets[part], given_ref)
    found = total.result()
    for name, value in wanted.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-3 if packed else 2e-4), name
    assert found.kld_mean == pytest.approx(wanted["kld_mean"], rel=5e-5 if packed else 1e-6)
    assert found.ppl == pytest.approx(wanted["ppl"], rel=1e-6)


def test_without_a_reference_only_perplexity_is_known() -> None:
    logits, targets = rows(50, 40), np.arange(50) % 40
    total = Accumulator()
    total.add(logits.copy(), targets)
    found = total.result()
    nll = -log_softmax(logits)[np.arange(50), targets]
    assert found.ppl == pytest.approx(math.exp(nll.mean()), rel=1e-6)
    assert found.kld_mean is None
    assert found.top1_agreement is None
    assert total.ppl == pytest.approx(found.ppl)


def test_a_model_against_itself_has_no_divergence() -> None:
    logits, targets = rows(200, 5000), np.arange(200)
    total = Accumulator()
    total.add(logits.copy(), targets, logits)
    assert total.result().kld_max == 0
    stored = Accumulator()
    stored.add(logits.copy(), targets, pack(logits.copy(), targets))
    found = stored.result()
    assert found.kld_mean is not None
    assert found.kld_mean < 2e-7
    assert found.top1_agreement == 1
    assert found.rms_dp == pytest.approx(0, abs=1e-6)


def test_threads_do_not_change_the_figures() -> None:
    ref, targets = rows(64, 9001), np.arange(64)
    logits = ref + rows(64, 9001, seed=3, spread=0.1)
    alone, shared = Accumulator(), Accumulator(ThreadPoolExecutor(3))
    for total in (alone, shared):
        total.add(logits.copy(), targets, ref)
    assert alone.result() == shared.result()


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(2, 400),
    st.floats(0, 15),
    st.integers(0, 2**32 - 1),
    st.floats(-1e4, 1e4),
)
def test_packing_is_off_by_half_a_step_at_most(
    n: int, n_vocab: int, spread: float, seed: int, offset: float
) -> None:
    logits = rows(n, n_vocab, seed, spread) + np.float32(offset)
    stored = pack(logits.copy(), np.zeros(n, np.int64))
    shifted = logits - logits.max(axis=1, keepdims=True)
    back = stored.codes * -stored.scale[:, None].astype(np.float64)
    allowed = 0.51 * stored.scale[:, None] + 4e-6
    assert (np.abs(back - np.maximum(shifted, -40)) <= allowed).all()
    assert (stored.top == logits.argmax(axis=1)).all()
    assert (stored.scale <= 40 / 65535 * 1.0001).all()


def test_packing_keeps_impossible_tokens_apart() -> None:
    logits = np.array([[0.0, 1.0, -np.inf, -1e30]], np.float32)
    stored = pack(logits.copy(), np.array([1]))
    assert stored.codes[0, 2] == stored.codes[0, 3] == 65535
    assert stored.nll[0] == pytest.approx(math.log(1 + math.exp(-1)))


def test_slices_of_packed_rows() -> None:
    stored = pack(rows(10, 20), np.zeros(10, np.int64))
    part = stored[2:5]
    assert isinstance(part, PackedRows)
    assert len(part) == 3
    assert (part.codes == stored.codes[2:5]).all()


def test_logits_that_are_not_finite_are_refused() -> None:
    bad = rows(5, 10)
    bad[3, 4] = np.nan
    with pytest.raises(DsqError, match="not finite \\(row 3 of a block of 5"):
        Accumulator().add(bad.copy(), np.zeros(5, np.int64))
    with pytest.raises(DsqError, match="reference's logits are not finite"):
        pack(bad.copy(), np.zeros(5, np.int64))


def test_misuse_is_an_error() -> None:
    total = Accumulator()
    with pytest.raises(ValueError, match="no tokens"):
        total.result()
    with pytest.raises(ValueError, match="as many rows"):
        total.add(rows(3, 5), np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="same vocabulary"):
        total.add(rows(3, 5), np.zeros(3, np.int64), rows(3, 6))
    total.add(rows(3, 5), np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="every block"):
        total.add(rows(3, 5), np.zeros(3, np.int64), rows(3, 5))


def test_blocks_cover_every_row_once() -> None:
    for n, n_vocab in ((1, 10), (100, 49152), (17, 30000), (5, 200000)):
        seen = np.zeros(n, int)

        def mark(block: slice, seen: np.ndarray = seen) -> None:
            seen[block] += 1

        for_blocks(n, n_vocab, mark, None)
        assert (seen == 1).all()


def test_percentile_and_stderr_by_hand() -> None:
    values = np.array([0.0, 1.0, 2.0, 10.0])
    assert percentile(values, 0.5) == 1.5
    assert percentile(values, 0.9) == pytest.approx(0.3 * 2 + 0.7 * 10)
    assert percentile(values, 1.0) == 10
    mean, stderr = mean_and_stderr(values)
    assert mean == 3.25
    assert stderr == pytest.approx(math.sqrt((0 + 1 + 4 + 100) / 4 - 3.25**2) / math.sqrt(3))
    assert mean_and_stderr(np.array([5.0])) == (5.0, 0.0)
