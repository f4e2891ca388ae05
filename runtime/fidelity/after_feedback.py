"""What is left of each tensor's divergence once errors are fed back (`--method compensated`).

Feedback takes three quarters of o's from the estimate of `sensitivity`, less than half of down's,
and leaves the head alone, so a mix for a compensated file is chosen by what is left. Its rows are
independent of each other: some rows of a matrix tell its share. What a matrix makes up for the
errors before it (the aim, see `two_ways`) is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
from dsq.convert.names import expected_tensors, gguf_name, permuted_heads
from dsq.convert.tensor_plan import interleaved_rows
from dsq.quant import ggml
from dsq.quant.compensated import compensated
from dsq.quant.mix import Choice
from dsq.quant.scheme import GgmlType
from dsq.quant.solver import DAMP, Factor, factor
from dsq.quant.stats import STAGES, Stats
from dsq.quant.threads import default_threads, torch_threads
from dsq.runtime.decoder import read_tensor

if TYPE_CHECKING:
    from torch import Tensor

F32Array = npt.NDArray[np.float32]
ROWS = 128  # of a matrix that are quantized, at most


def after_feedback(
    checkpoint: HfCheckpoint | GgufCheckpoint,
    stats: Stats,
    table: Mapping[str, Sequence[Choice]],
    *,
    damp: float = DAMP,
    device: str = "cpu",
    n_threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Sequence[Choice]]:
    """The table of `sensitivity.sensitivities`, the layers' divergences as feedback leaves them."""
    import torch

    found = dict(table)
    hf_names = {gguf_name(hf): hf for hf in expected_tensors(checkpoint.spec)}
    n_layer, threads = checkpoint.spec.n_layer, n_threads or default_threads()
    with ThreadPoolExecutor(threads) as pool, torch_threads(threads):
        for layer in range(n_layer):
            for stage, linears in STAGES.items():
                read = stats.inputs[f"blk.{layer}.{stage}"]
                assert read.hessian is not None, "the table was made of Hessians"
                names = [f"blk.{layer}.{linear}.weight" for linear in linears]
                rows = [_sample(checkpoint, stats, name, hf_names[name]) for name in names]
                weight = np.concatenate([weight for weight, _ in rows])
                hessian = torch.from_numpy(read.hessian).to(device)
                under = factor(hessian, names[0], damp)
                measure = _Measure(names[0], weight, hessian, under, read.mean_sq, pool)
                for i, choice in enumerate(table[names[0]]):
                    if not choice.type.is_quantized:
                        continue
                    plain, left = measure.errors(choice.type)
                    start = 0
                    for name, (part, gradient) in zip(names, rows, strict=True):
                        mine = slice(start, start + len(part))
                        start = mine.stop
                        share = float(gradient @ left[mine]) / (float(gradient @ plain[mine]) or 1)
                        row = list(found[name])
                        row[i] = replace(row[i], kld=row[i].kld * share)
                        found[name] = row
            progress(layer + 1, n_layer)
    return found


def _sample(
    checkpoint: HfCheckpoint | GgufCheckpoint, stats: Stats, name: str, hf_name: str
) -> tuple[F32Array, npt.NDArray[np.float64]]:
    """Some rows of a matrix, and E[(∂L/∂y_o)²] of each."""
    weight = read_tensor(checkpoint, hf_name).numpy()
    heads = permuted_heads(name, checkpoint.spec)
    if heads:  # gradients are in GGUF's row order
        weight = weight[interleaved_rows(len(weight), heads)]
    chosen = np.random.default_rng(0).permutation(len(weight))[:ROWS]
    return weight[chosen], stats.gradients[name][chosen].astype(np.float64)


@dataclass(frozen=True, eq=False)
class _Measure:
    """Rows (n_out, n_in) that read one input, quantized in two ways."""

    name: str
    weight: F32Array
    hessian: Tensor
    under: Factor
    importance: F32Array
    pool: Executor

    def errors(self, of: GgmlType) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """δ H δᵀ of each row (n_out): rounded plainly with an importance matrix, and fed back."""
        import torch

        weight = torch.from_numpy(self.weight).to(self.hessian)
        data = ggml.quantize(self.weight, of, self.importance)
        rounded = ggml.dequantize(data, of, self.weight.shape[1])
        plain = torch.from_numpy(rounded).to(weight) - weight
        ones = torch.ones_like(self.under.cost)
        left = compensated(self.name, weight, self.under, of, ones, self.pool).values - weight
        return self._costs(plain), self._costs(left)

    def _costs(self, missed: Tensor) -> npt.NDArray[np.float64]:
        costs: npt.NDArray[np.float64] = (
            ((missed @ self.hessian) * missed).sum(1).double().cpu().numpy()
        )
        return costs
