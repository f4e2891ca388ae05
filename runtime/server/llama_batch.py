"""One llama.cpp context with many sequences: batches in, logits out, prefixes shared or dropped."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from dsq.errors import DsqError, InputError, UnsupportedError
from dsq.quant.threads import free_cores
from dsq.runtime.engine import Floats
from dsq.runtime.llamacpp import Batch, FlashAttention, LlamaModel

KV_TYPES = ("f16", "q8_0", "q4_0")


@dataclass(frozen=True)
class LlamaSettings:
    """How to run a GGUF file for many requests.

    A request may have `n_ctx` tokens (0: what the model was trained on). All share one cache of
    `kv_size` tokens (0: n_ctx). `n_parallel` run at once, `n_prefixes` more sequences only keep
    prefixes. `n_draft` is the longest prompt-lookup draft, 0 switches it off. A step that carries
    prompt tokens beside running streams is to take about `gap_ms`. `draft_path` names a smaller
    GGUF that guesses ahead (see `dsq.runtime.server.draft_check`).
    """

    path: str
    n_ctx: int = 0
    kv_size: int = 0
    n_parallel: int = 4
    n_prefixes: int = 4
    n_batch: int = 512
    n_threads: int | None = None
    n_gpu_layers: int = 0
    kv_type: str = "f16"
    flash_attention: FlashAttention = "auto"
    n_draft: int = 24
    gap_ms: float = 150.0
    draft_path: str = ""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("n_ctx", 0, 2**24),
            ("kv_size", 0, 2**26),
            ("n_parallel", 1, 128),
            ("n_prefixes", 0, 127),
            ("n_batch", 32, 2**16),
            ("n_draft", 0, 256),
            ("gap_ms", 1.0, 1e6),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(f"{name} is {value}; it must be from {low:g} to {high:g}")
        if self.n_parallel > self.n_batch:
            raise InputError(
                f"n_parallel is {self.n_parallel}, n_batch {self.n_batch}; a batch must hold a "
                "token of every running request: raise n_batch"
            )
        if self.kv_type not in KV_TYPES:
            raise InputError(f"kv_type is {self.kv_type}; choose one of {', '.join(KV_TYPES)}")
        if self.kv_type != "f16" and self.flash_attention is False:
            raise InputError(
                f"a {self.kv_type} KV cache needs flash attention; leave it on, or take f16"
            )


class LlamaBatch(LlamaModel):
    """The model and its context. Sequences are numbered from 0. Use from one thread."""

    def __init__(self, settings: LlamaSettings) -> None:
        super().__init__(settings.path, n_gpu_layers=settings.n_gpu_layers)
        model = self._model
        if llama_cpp.llama_model_is_recurrent(model) or llama_cpp.llama_model_is_hybrid(model):
            raise UnsupportedError(
                f"{self.path}: a recurrent model cannot forget a part of a sequence, which serving "
                "needs; use llama.cpp's own server"
            )
        self.n_ctx = settings.n_ctx or self.n_ctx_train
        self.kv_size = settings.kv_size or self.n_ctx
        if self.n_ctx < 2:
            raise InputError(f"{self.path}: a context of {self.n_ctx} holds no prompt and answer")
        if self.kv_size < self.n_ctx:
            raise InputError(
                f"kv_size is {self.kv_size}, less than the {self.n_ctx} tokens a request may have"
            )
        self.n_parameters = int(llama_cpp.llama_model_n_params(model))
        self.size_bytes = int(llama_cpp.llama_model_size(model))
        self.n_batch, self.kv_type = settings.n_batch, settings.kv_type
        self._batch = Batch(self.n_batch)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self.kv_size
        params.n_batch = params.n_ubatch = self.n_batch
        params.n_seq_max = settings.n_parallel + settings.n_prefixes
        params.n_threads = params.n_threads_batch = settings.n_threads or free_cores()
        params.kv_unified = True  # sequences that begin alike share cells
        params.swa_full = True  # so that any suffix can be forgotten
        self._open(params, settings.kv_type, settings.flash_attention)

    @property
    def context(self) -> llama_cpp.llama_context_p:
        """For samplers, which read the last batch's logits."""
        return self._ctx

    def remove(self, sequence: int, start: int) -> None:
        """Forget the sequence's tokens from position `start` on."""
        if not llama_cpp.llama_memory_seq_rm(self._memory, sequence, start, -1):
            raise DsqError(f"{self.path}: this model cannot forget a part of its sequence")

    def copy(self, source: int, target: int, n: int) -> None:
        """Let `target`, empty until now, share the first `n` tokens of `source`."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, 0, n)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, False)

    def size_of(self, sequence: int) -> int:
        """Bytes of `save`d."""
        return int(llama_cpp.llama_state_seq_get_size(self._ctx, sequence))

    def save(self, sequence: int) -> npt.NDArray[np.uint8]:
        """The keys and values of a sequence. Raises DsqError when llama.cpp cannot."""
        data = np.empty(self.size_of(sequence), np.uint8)
        if llama_cpp.llama_state_seq_get_data(self._ctx, _bytes(data), data.size, sequence) != (
            data.size
        ):
            raise DsqError(f"{self.path}: llama.cpp did not save a sequence")
        return data

    def restore(self, sequence: int, data: npt.NDArray[np.uint8]) -> None:
        """Put back what was saved, as this sequence. Raises DsqError when it does not fit."""
        if not llama_cpp.llama_state_seq_set_data(self._ctx, _bytes(data), data.size, sequence):
            raise DsqError(f"{self.path}: llama.cpp did not restore a sequence")

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int],
        wanted: Sequence[int],
    ) -> Floats:
        """Evaluate one batch; logits (n, n_vocab) of the rows whose `wanted` is 1, in order.

        The array lies in llama.cpp's memory: it is valid until the next batch.
        """
        self._evaluate(
            self._batch.fill(
                np.array(tokens, np.int32),
                np.array(positions, np.int32),
                np.array(sequences, np.int32),
                np.array(wanted, np.int8),
            )
        )
        rows = sum(wanted)
        if not rows:
            # Nothing was waited for; on a GPU the work may still run.
            llama_cpp.llama_synchronize(self._ctx)
            return np.zeros((0, self.n_vocab), np.float32)
        pointer = llama_cpp.llama_get_logits(self._ctx)
        return np.ctypeslib.as_array(pointer, shape=(rows, self.n_vocab))


def _bytes(data: npt.NDArray[np.uint8]) -> Any:
    return ctypes.cast(data.ctypes.data, ctypes.POINTER(ctypes.c_uint8))
