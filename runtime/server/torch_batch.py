"""Many sequences in torch: the interface of `LlamaBatch` over transformers' Llama.

The KV cache is one pool of cells, as llama.cpp's unified cache is: each cell has a position and the
sequences that it belongs to, so sequences that begin alike share cells. A batch is one row of
tokens; the mask says which cells each of them sees. What is sampled, and how, is llama.cpp's: its
samplers work on the directory's own vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsq.errors import DsqError, InputError
from dsq.quant.threads import free_cores
from dsq.runtime.engine import Floats
from dsq.runtime.server.engines import EngineOptions
from dsq.runtime.server.llama_cpp_vocab import LlamaCppVocab
from dsq.runtime.server.loop import Loop

if TYPE_CHECKING:
    from torch import Tensor

    from dsq.convert.checkpoint import HfCheckpoint


MOST_PARALLEL = 128


@dataclass(frozen=True)
class TorchSettings:
    """How to run a directory for many requests; see `LlamaSettings`.

    `device`: auto, cpu or cuda.
    """

    path: str
    n_ctx: int = 0
    kv_size: int = 0
    n_parallel: int = 4
    n_prefixes: int = 4
    n_batch: int = 512
    n_threads: int | None = None
    device: str = "auto"
    n_draft: int = 24
    gap_ms: float = 150.0

    def __post_init__(self) -> None:
        if not 1 <= self.n_parallel <= MOST_PARALLEL:
            raise InputError(
                f"n_parallel is {self.n_parallel}; it must be from 1 to {MOST_PARALLEL}"
            )


def torch_settings(path: Path, options: EngineOptions) -> TorchSettings:
    return TorchSettings(
        str(path),
        n_ctx=options.n_ctx,
        kv_size=options.kv_size,
        n_parallel=options.n_parallel or TorchSettings.n_parallel,
        n_threads=options.n_threads,
        n_draft=TorchSettings.n_draft if options.lookup else 0,
    )


def torch_loop(settings: TorchSettings) -> Loop:
    """The loop over a directory in torch."""
    return Loop(settings, TorchBatch(settings))


class Cells:
    """Which cell holds which position of which sequences. No tensors."""

    def __init__(self, n_sequences: int, size: int) -> None:
        self._owner = np.zeros((n_sequences, size), np.bool_)
        self._position = np.zeros(size, np.int64)

    def take(
        self, sequences: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """A free cell for each token, the lowest first. Raises DsqError when there are too few."""
        free = np.flatnonzero(~self._owner.any(axis=0))
        if len(free) < len(sequences):
            raise DsqError(f"the KV cache is full: {len(sequences)} tokens, {len(free)} free cells")
        cells = free[: len(sequences)]
        self._owner[sequences, cells] = True
        self._position[cells] = positions
        return cells

    def visible(
        self, sequences: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """(tokens, cells): its sequence's cells up to its position; up to the last used cell."""
        used = np.flatnonzero(self._owner.any(axis=0))
        n = int(used[-1]) + 1 if len(used) else 0
        return self._owner[sequences, :n] & (self._position[None, :n] <= positions[:, None])

    def remove(self, sequence: int, start: int) -> None:
        self._owner[sequence] &= self._position < start

    def copy(self, source: int, target: int, n: int) -> None:
        self._owner[target] |= self._owner[source] & (self._position < n)

    def clear(self) -> None:
        self._owner[:] = False


class _Pool:
    """Keys and values of all layers, as transformers' models ask for them."""

    def __init__(self, n_layer: int, shape: tuple[int, ...], dtype: Any, device: str) -> None:
        import torch

        self._keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layer)]
        self._values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layer)]
        self.cells: Any = None  # of the batch's tokens
        self.n_seen = 0

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Store the batch's; give out those of every cell in use."""
        k, v = self._keys[layer], self._values[layer]
        k.index_copy_(2, self.cells, keys)
        v.index_copy_(2, self.cells, values)
        return k[:, :, : self.n_seen], v[:, :, : self.n_seen]


class TorchBatch:
    """The model and its cache. Sequences are numbered from 0. Use from one thread.

    Raises InputError for a directory that torch cannot run.
    """

    context = None  # there is none of llama.cpp: samplers get the logits

    def __init__(self, settings: TorchSettings) -> None:
        from dsq.runtime.torch_engine import load_model, open_directory, require_torch

        self.path = settings.path
        require_torch(self.path)
        import torch

        from dsq.runtime.decoder import chosen_device

        checkpoint = open_directory(Path(self.path))
        spec = checkpoint.spec
        self.n_ctx_train = spec.n_ctx
        self.n_ctx = settings.n_ctx or spec.n_ctx
        self.kv_size = settings.kv_size or self.n_ctx
        if self.kv_size < self.n_ctx:
            raise InputError(
                f"kv_size is {self.kv_size}, less than the {self.n_ctx} tokens a request may have"
            )
        self.n_vocab = spec.n_vocab
        self.n_parameters = sum(t.n_elements for t in checkpoint.tensors.values())
        self.size_bytes = sum(checkpoint.stored_as(name)[1] for name in checkpoint.tensors)
        self._vocab = LlamaCppVocab(checkpoint.vocabulary())
        self._torch, self._device = torch, chosen_device(settings.device)
        torch.set_num_threads(settings.n_threads or free_cores())
        self._model: Any = load_model(checkpoint, self._device)
        self._cells = Cells(settings.n_parallel + settings.n_prefixes, self.kv_size)
        dtype = self._dtype(checkpoint)
        self.kv_type = str(dtype).removeprefix("torch.")
        shape = (1, spec.n_head_kv, self.kv_size, spec.head_dim)
        self._pool = _Pool(spec.n_layer, shape, dtype, self._device)

    def _dtype(self, checkpoint: HfCheckpoint) -> Any:
        from dsq.runtime.torch_engine import card_dtype

        return self._torch.float32 if self._device == "cpu" else card_dtype(checkpoint)

    @property
    def vocab(self) -> Any:
        return self._vocab.pointer

    def remove(self, sequence: int, start: int) -> None:
        """Forget the sequence's tokens from position `start` on."""
        self._cells.remove(sequence, start)

    def copy(self, source: int, target: int, n: int) -> None:
        """Let `target`, empty until now, share the first `n` tokens of `source`."""
        self._cells.copy(source, target, n)

    def clear(self) -> None:
        self._cells.clear()

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int],
        wanted: Sequence[int],
    ) -> Floats:
        """Evaluate one batch; logits (n, n_vocab) of the rows whose `wanted` is 1, in order."""
        torch, device, pool = self._torch, self._device, self._pool
        where, whose = np.array(positions, np.int64), np.array(sequences, np.int64)
        cells = self._cells.take(whose, where)
        mask = self._cells.visible(whose, where)
        pool.cells, pool.n_seen = torch.from_numpy(cells).to(device), mask.shape[1]
        with torch.inference_mode():
            hidden = self._model.model(
                input_ids=torch.tensor([list(tokens)], device=device),
                attention_mask=torch.from_numpy(mask)[None, None].to(device),
                position_ids=torch.from_numpy(where)[None].to(device),
                past_key_values=pool,
                use_cache=True,
            ).last_hidden_state[0]
            rows = torch.from_numpy(np.flatnonzero(wanted)).to(device)
            logits: Floats = self._model.lm_head(hidden[rows]).float().cpu().numpy()
        return logits

    def close(self) -> None:
        """Free the model. Closing twice is allowed."""
        self._model = None
        self._vocab.close()

    def __enter__(self) -> TorchBatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
