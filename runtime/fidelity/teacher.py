"""The original's predictions on some windows, computed once, layer by layer, and kept on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dsq.convert.atomic import check_space
from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
from dsq.convert.spec import ModelSpec
from dsq.quant.drift import pack
from dsq.quant.fileio import read_at, reserve, write_at
from dsq.runtime.calibration.borders import Border
from dsq.runtime.decoder import Decoder, read_layer, read_tensor

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 256  # whose logits are in memory at once
_BATCH_TOKENS = 2048


class Teacher:
    """Log-probabilities by window; stored as `quant.drift.pack` does, 2 bytes a logit."""

    def __init__(
        self,
        source: HfCheckpoint | GgufCheckpoint,
        graph: Decoder,
        windows: npt.NDArray[np.int32],
        folder: Path,
    ) -> None:
        self._source, self._graph, self._windows, self._folder = source, graph, windows, folder
        self._n_vocab = source.spec.n_vocab
        self._row_bytes = _row_bytes(self._n_vocab)
        self._path = folder / "logits"
        stored = self._path.stat().st_size if self._path.exists() else 0  # by a killed run
        check_space(self._path, self.disk_bytes(source.spec, windows.size) - stored)

    @staticmethod
    def disk_bytes(spec: ModelSpec, n_tokens: int) -> int:
        return n_tokens * (_row_bytes(spec.n_vocab) + 8 * spec.n_embd)

    def run(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compute and store everything. One layer of weights is in memory at a time."""
        with open(self._path, "wb") as out:
            reserve(out.fileno(), self._windows.size * self._row_bytes)
            for row, logits in self._logits(self._source, progress):
                self._store(out.fileno(), row, logits)
            os.fsync(out.fileno())

    def kld(self, candidate: HfCheckpoint | GgufCheckpoint) -> float:
        """Mean KL divergence of a candidate's predictions over all windows, in nats a token."""
        import torch

        total = 0.0
        with torch.inference_mode():
            windows = range(len(self._windows))
            parts = (wanted for _, wanted in self.parts(list(windows)))
            for (_, logits), wanted in zip(self._logits(candidate), parts, strict=True):
                total += kld(wanted, logits).item()
        return total / self._windows.size

    def _logits(
        self,
        model: HfCheckpoint | GgufCheckpoint,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Iterator[tuple[int, Tensor]]:
        """(first row, logits) of up to ROWS rows at a time, in order; no part spans two windows."""
        import torch

        spec, ids = model.spec, torch.from_numpy(self._windows.astype(np.int64))
        shape = (len(ids), ids.shape[1], spec.n_embd)
        n = max(1, _BATCH_TOKENS // shape[1])
        starts = range(0, shape[0], n)
        device = self._graph.device
        with torch.inference_mode(), Border(self._folder / "hidden", shape, create=True) as border:
            embedding = read_tensor(model, "model.embed_tokens.weight")
            for start in starts:
                border.write(start, embedding[ids[start : start + n]])
            del embedding
            for i in range(spec.n_layer):
                weights = read_layer(model, i, device)
                for start in starts:  # in place: a window's states depend on no other window
                    hidden = border.read(start, min(n, shape[0] - start)).to(device)
                    border.write(start, self._graph.layer(weights, hidden))
                del weights
                progress(i + 1, spec.n_layer + 1)
            norm = read_tensor(model, "model.norm.weight", device)
            name = "model.embed_tokens.weight" if spec.tied else "lm_head.weight"
            head = read_tensor(model, name, device)
            for window in range(shape[0]):
                rows = border.read(window, 1)[0].to(device)
                for at in range(0, len(rows), ROWS):
                    logits = self._graph.logits(norm, head, rows[at : at + ROWS])
                    yield window * shape[1] + at, logits
            progress(spec.n_layer + 1, spec.n_layer + 1)

    def _store(self, file: int, row: int, logits: Tensor) -> None:
        values = logits.float().cpu().numpy()
        packed = pack(values, np.zeros(len(values), np.int64))
        record = np.empty(len(values), self._record)
        record["codes"], record["scale"] = packed.codes, packed.scale
        write_at(file, record.view(np.uint8).data, row * self._row_bytes)

    @property
    def _record(self) -> np.dtype[np.void]:
        return np.dtype([("codes", "<u2", self._n_vocab), ("scale", "<f4")])

    def parts(self, batch: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the batch's windows laid end to end, some at a time, and their log p."""
        import torch

        n_ctx = self._windows.shape[1]
        with open(self._path, "rb") as file:
            for k, window in enumerate(batch):
                for at in range(0, n_ctx, ROWS):
                    n = min(ROWS, n_ctx - at)
                    record = np.empty(n, self._record)
                    place = (window * n_ctx + at) * self._row_bytes
                    read_at(file.fileno(), record.view(np.uint8).data, place)
                    shifted = record["codes"].astype(np.float32)
                    shifted *= -record["scale"][:, None]
                    log_p = torch.from_numpy(shifted).to(self._graph.device).log_softmax(-1)
                    yield slice(k * n_ctx + at, k * n_ctx + at + n), log_p


def _row_bytes(n_vocab: int) -> int:
    return 2 * n_vocab + 4  # codes, and the row's scale


def kld(wanted: Tensor, logits: Tensor) -> Tensor:
    """Σ over rows of KL(p ‖ softmax(logits)), `wanted` being log p (rows, n_vocab)."""
    return (wanted.exp() * (wanted - logits.log_softmax(-1))).sum()
