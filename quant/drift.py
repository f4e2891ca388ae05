"""How far a model's predictions drift from a reference: perplexity, KL divergence, agreement.

Definitions are those of llama.cpp's `tools/perplexity/perplexity.cpp`, so figures can be compared:
population variance over n - 1 for standard errors, its interpolated percentiles, dp the change of
the right token's probability. Two deliberate differences: both distributions are normalized
exactly, and no tail is cut off (llama-perplexity leaves out tokens whose reference log-probability
is below -16). A model against itself thus measures 1e-8 where llama-perplexity shows noise of
either sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsq.errors import DsqError

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

RANGE = 40.0  # logits further below the row's maximum are stored as max - 40: e**-40 is 4e-18
_STEPS = 65535
_BLOCK = 65536  # values per block: the block and its two scratch copies stay in a core's cache


@dataclass(frozen=True)
class PackedRows:
    """Reference predictions at 2 bytes a value: logit = max - scale * code.

    A step is at most 40 / 65535, so a stored logit is off by at most 3.1e-4 (usually 2e-4), which
    moves the KL divergence of a model with itself to about 1e-8. `nll` and `top` are exact.
    """

    codes: npt.NDArray[np.uint16]  # (n, n_vocab)
    scale: Floats  # (n,)
    nll: Floats  # (n,) negative log-likelihood of the target
    top: npt.NDArray[np.int32]  # (n,) the likeliest token

    def __len__(self) -> int:
        return len(self.nll)

    def __getitem__(self, rows: slice) -> PackedRows:
        return PackedRows(self.codes[rows], self.scale[rows], self.nll[rows], self.top[rows])


@dataclass(frozen=True)
class Drift:
    """Statistics over `tokens` scored tokens. Divergences in nats; agreement and dp as fractions.

    Without a reference every field that needs one is None.
    """

    tokens: int
    ppl: float
    ppl_stderr: float
    ref_ppl: float | None = None
    kld_mean: float | None = None
    kld_stderr: float | None = None
    kld_median: float | None = None
    kld_p99: float | None = None
    kld_p999: float | None = None
    kld_max: float | None = None
    top1_agreement: float | None = None  # llama-perplexity prints these three in percent
    top1_stderr: float | None = None
    rms_dp: float | None = None


@dataclass(frozen=True)
class TokenScores:
    """The scored tokens one by one, in order; each array (n,). The last three need a reference."""

    nll: Doubles
    top: npt.NDArray[np.int64]  # the likeliest token
    ref_nll: Doubles | None = None
    ref_top: npt.NDArray[np.int64] | None = None
    kld: Doubles | None = None


class Accumulator:
    """Adds up predictions, some rows at a time; the pool's threads, if given, share the work."""

    def __init__(self, pool: ThreadPoolExecutor | None = None) -> None:
        self._pool = pool
        self._nll: list[Doubles] = []
        self._ref_nll: list[Doubles] = []
        self._kld: list[Doubles] = []
        self._top: list[npt.NDArray[np.int64]] = []
        self._ref_top: list[npt.NDArray[np.int64]] = []

    def add(
        self,
        logits: Floats,
        targets: npt.NDArray[np.integer],
        ref: PackedRows | Floats | None = None,
    ) -> None:
        """Score rows of logits (n, n_vocab) that predict `targets` (n,).

        `ref` holds the reference's predictions of the same rows: packed, or logits (or
        log-probabilities: a constant per row does not matter). `logits` is overwritten.
        """
        n = len(targets)
        if logits.shape[0] != n or (ref is not None and len(ref) != n):
            raise ValueError("logits, targets and ref need as many rows as each other")
        if ref is not None and _width(ref) != logits.shape[1]:
            raise ValueError("logits and ref need the same vocabulary")
        if bool(self._nll) and bool(self._kld) != (ref is not None):
            raise ValueError("either every block has a reference or none has")
        if n == 0:
            return
        nll, ref_nll, kld = np.empty(n), np.empty(n), np.empty(n)
        top, ref_top = np.empty(n, np.int64), np.empty(n, np.int64)

        def score(rows: slice) -> None:
            x, target = logits[rows], targets[rows]
            scratch = np.empty_like(x)
            top[rows], nll[rows], log_sum = _shift(x, target, scratch)
            if ref is not None:
                part = ref[rows]
                shifted, ref_top[rows], ref_nll[rows] = _reference(part, target, scratch)
                kld[rows] = _kld(shifted, x, log_sum, scratch)

        for_blocks(n, logits.shape[1], score, self._pool)
        if not np.isfinite(nll).all():
            bad = int(np.flatnonzero(~np.isfinite(nll))[0])
            raise DsqError(f"the model's logits are not finite (row {bad} of a block of {n})")
        self._nll.append(nll)
        self._top.append(top)
        if ref is not None:
            self._ref_nll.append(ref_nll)
            # Negative only by rounding, about 1e-7: the true divergence never is.
            self._kld.append(np.maximum(kld, 0))
            self._ref_top.append(ref_top)

    def result(self) -> Drift:
        """The statistics so far; raises ValueError when nothing was added."""
        if not self._nll:
            raise ValueError("no tokens were scored")
        nll = np.concatenate(self._nll)
        mean, stderr = mean_and_stderr(nll)
        ppl = math.exp(mean)
        if not self._kld:
            return Drift(len(nll), ppl, ppl * stderr)
        ref_nll, kld = np.concatenate(self._ref_nll), np.sort(np.concatenate(self._kld))
        kld_mean, kld_stderr = mean_and_stderr(kld)
        same = float((np.concatenate(self._top) == np.concatenate(self._ref_top)).mean())
        dp = np.exp(-nll) - np.exp(-ref_nll)
        return Drift(
            tokens=len(nll),
            ppl=ppl,
            ppl_stderr=ppl * stderr,
            ref_ppl=math.exp(ref_nll.mean()),
            kld_mean=kld_mean,
            kld_stderr=kld_stderr,
            kld_median=float(np.median(kld)),
            kld_p99=percentile(kld, 0.99),
            kld_p999=percentile(kld, 0.999),
            kld_max=float(kld[-1]),
            top1_agreement=same,
            top1_stderr=math.sqrt(same * (1 - same) / max(len(nll) - 1, 1)),
            rms_dp=math.sqrt(float(np.mean(dp * dp))),
        )

    def tokens(self) -> TokenScores:
        """What `result` sums up; raises ValueError when nothing was added."""
        if not self._nll:
            raise ValueError("no tokens were scored")
        nll, top = np.concatenate(self._nll), np.concatenate(self._top)
        if not self._kld:
            return TokenScores(nll, top)
        ref_nll, kld = np.concatenate(self._ref_nll), np.concatenate(self._kld)
        return TokenScores(nll, top, ref_nll, np.concatenate(self._ref_top), kld)

    @property
    def ppl(self) -> float:
        """Perplexity so far, for progress lines; nan before the first token."""
        count = sum(len(part) for part in self._nll)
        return math.exp(sum(float(part.sum()) for part in self._nll) / count) if count else math.nan


def pack(
    logits: Floats, targets: npt.NDArray[np.integer], pool: ThreadPoolExecutor | None = None
) -> PackedRows:
    """Reference logits (n, n_vocab) as PackedRows. `logits` is overwritten."""
    n, n_vocab = logits.shape
    rows_out = PackedRows(
        np.empty((n, n_vocab), np.uint16),
        np.empty(n, np.float32),
        np.empty(n, np.float32),
        np.empty(n, np.int32),
    )

    def one(rows: slice) -> None:
        x, target = logits[rows], targets[rows]
        scratch = np.empty_like(x)
        rows_out.top[rows], rows_out.nll[rows], _ = _shift(x, target, scratch)
        np.maximum(x, -RANGE, out=x)
        scale = x.min(axis=1) / np.float32(-_STEPS)
        scale[scale < 1e-30] = 0  # all logits equal: every code is 0
        rows_out.scale[rows] = scale
        x *= (-1 / np.where(scale > 0, scale, 1))[:, None]
        x += np.float32(0.5)
        with np.errstate(invalid="ignore"):  # nan is refused below, with a better message
            np.copyto(rows_out.codes[rows], np.minimum(x, _STEPS, out=x), casting="unsafe")

    for_blocks(n, n_vocab, one, pool)
    if not np.isfinite(rows_out.nll).all():
        raise DsqError("the reference's logits are not finite")
    return rows_out


def for_blocks(
    n: int, n_vocab: int, work: Callable[[slice], None], pool: ThreadPoolExecutor | None
) -> None:
    """Call `work` for slices of a few rows each, on the pool's threads when there is one."""
    step = max(1, _BLOCK // n_vocab)
    blocks = [slice(i, min(i + step, n)) for i in range(0, n, step)]
    if pool is None:
        for block in blocks:
            work(block)
    else:
        for _ in pool.map(work, blocks):
            pass


def _width(ref: PackedRows | Floats) -> int:
    return int((ref.codes if isinstance(ref, PackedRows) else ref).shape[1])


def _shift(
    x: Floats, targets: npt.NDArray[np.integer], scratch: Floats
) -> tuple[npt.NDArray[np.intp], Doubles, Doubles]:
    """Subtract each row's maximum in place; the arg-maxima, the targets' NLL, log sum exp."""
    index = np.arange(len(x))
    top = x.argmax(axis=1)
    with np.errstate(invalid="ignore", under="ignore"):
        x -= x[index, top][:, None]
        log_sum = np.log(np.exp(x, out=scratch).sum(axis=1).astype(np.float64))
    return top, log_sum - x[index, targets], log_sum


def _reference(
    ref: PackedRows | Floats, targets: npt.NDArray[np.integer], scratch: Floats
) -> tuple[Floats, npt.NDArray[np.integer], Doubles | Floats]:
    """Logits minus their row's maximum, the arg-maxima and the targets' NLL."""
    if isinstance(ref, PackedRows):
        shifted = ref.codes.astype(np.float32)
        shifted *= -ref.scale[:, None]
        return shifted, ref.top, ref.nll
    shifted = ref.astype(np.float32, copy=True)
    top, nll, _ = _shift(shifted, targets, scratch)
    return shifted, top, nll


def _kld(ref: Floats, x: Floats, log_sum: Doubles, scratch: Floats) -> Doubles:
    """sum P (log P - log Q) per row; `ref` and `x` are logits minus their maximum.

    The difference is taken before it is weighted: its rounding error is then relative to it.
    """
    with np.errstate(under="ignore"):
        p = np.exp(ref, out=scratch)
        total = p.sum(axis=1).astype(np.float64)
        ref -= x
        ref *= p
    kld: Doubles = ref.sum(axis=1) / total - np.log(total) + log_sum
    return kld


def mean_and_stderr(values: Doubles) -> tuple[float, float]:
    """perplexity.cpp's mean_and_uncertainty, without its cancellation."""
    n = len(values)
    return float(values.mean()), math.sqrt(float(values.var()) / (n - 1)) if n > 1 else 0.0


def percentile(ordered: Doubles, fraction: float) -> float:
    """perplexity.cpp's percentile of sorted values: linear between the two nearest ranks."""
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    part = position - low
    return float((1 - part) * ordered[low] + part * ordered[high])
