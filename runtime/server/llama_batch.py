"""One llama.cpp context with many sequences: batches in, logits out, prefixes shared or dropped."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from dsq.errors import DsqError, InputError, UnsupportedError
from dsq.quant.scheme import ggml_type
from dsq.quant.threads import free_cores
from dsq.runtime import llama_log
from dsq.runtime.engine import Floats
from dsq.runtime.llamacpp import FLASH_ATTENTION, Batch, FlashAttention

KV_TYPES = ("f16", "q8_0", "q4_0")


@dataclass(frozen=True)
class LlamaSettings:
    """How to run a GGUF file for many requests.

    A request may have `n_ctx` tokens (0: what the model was trained on). All share one cache of
    `kv_size` tokens (0: n_ctx). `n_parallel` run at once, `n_prefixes` more sequences only keep
    prefixes. `n_draft` is the longest prompt-lookup draft, 0 switches it off. A step that carries
    prompt tokens beside running streams is to take about `gap_ms`.
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


class LlamaBatch:
    """The model and its context. Sequences are numbered from 0. Use from one thread.

    Raises InputError for a file that is no model or a build that cannot do what is asked.
    """

    def __init__(self, settings: LlamaSettings) -> None:
        self._model = self._ctx = None  # so that close() works whatever fails below
        self._memory: Any = None
        self._batch = Batch(settings.n_batch)
        self.path = settings.path
        if not Path(self.path).is_file():
            raise InputError(f"{self.path}: no such file")
        if settings.n_gpu_layers and not llama_cpp.llama_supports_gpu_offload():
            raise InputError(
                f"{settings.n_gpu_layers} layers asked for the GPU, but llama-cpp-python was built "
                "without one; reinstall it with CMAKE_ARGS=-DGGML_CUDA=on pip install "
                "--force-reinstall --no-cache-dir llama-cpp-python, or ask for 0"
            )
        llama_log.install(verbose=False)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = settings.n_gpu_layers
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._model:
            raise InputError(f"{self.path}: llama.cpp cannot load it: {llama_log.last_errors()}")
        try:
            self._open(settings)
        except BaseException:
            self.close()
            raise

    def _open(self, settings: LlamaSettings) -> None:
        model = self._model
        if llama_cpp.llama_model_is_recurrent(model) or llama_cpp.llama_model_is_hybrid(model):
            raise UnsupportedError(
                f"{self.path}: a recurrent model cannot forget a part of a sequence, which serving "
                "needs; use llama.cpp's own server"
            )
        self.n_ctx_train = int(llama_cpp.llama_model_n_ctx_train(model))
        self.n_ctx = settings.n_ctx or self.n_ctx_train
        self.kv_size = settings.kv_size or self.n_ctx
        if self.n_ctx < 2:
            raise InputError(f"{self.path}: a context of {self.n_ctx} holds no prompt and answer")
        if self.kv_size < self.n_ctx:
            raise InputError(
                f"kv_size is {self.kv_size}, less than the {self.n_ctx} tokens a request may have"
            )
        self.vocab = llama_cpp.llama_model_get_vocab(model)
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(self.vocab))
        self.n_parameters = int(llama_cpp.llama_model_n_params(model))
        self.size_bytes = int(llama_cpp.llama_model_size(model))
        self.n_batch = settings.n_batch
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self.kv_size
        params.n_batch = params.n_ubatch = self.n_batch
        params.n_seq_max = settings.n_parallel + settings.n_prefixes
        params.n_threads = params.n_threads_batch = settings.n_threads or free_cores()
        params.flash_attn_type = FLASH_ATTENTION[settings.flash_attention]
        params.type_k = params.type_v = ggml_type(settings.kv_type).id
        params.kv_unified = True  # sequences that begin alike share cells
        params.swa_full = True  # so that any suffix can be forgotten
        params.no_perf = True
        self._ctx = llama_cpp.llama_init_from_model(model, params)
        if not self._ctx:
            raise DsqError(
                f"{self.path}: llama.cpp cannot make a {settings.kv_type} KV cache of "
                f"{self.kv_size} tokens: {llama_log.last_errors() or 'out of memory?'}"
            )
        self._memory = llama_cpp.llama_get_memory(self._ctx)

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
        batch = self._batch.fill(
            np.array(tokens, np.int32),
            np.array(positions, np.int32),
            np.array(sequences, np.int32),
            np.array(wanted, np.int8),
        )
        code = llama_cpp.llama_decode(self._ctx, batch)
        if code:
            reason = "its KV cache is full" if code == 1 else llama_log.last_errors()
            raise DsqError(f"{self.path}: llama_decode failed ({code}): {reason}")
        rows = sum(wanted)
        if not rows:
            # Nothing was waited for; on a GPU the work may still run.
            llama_cpp.llama_synchronize(self._ctx)
            return np.zeros((0, self.n_vocab), np.float32)
        pointer = llama_cpp.llama_get_logits(self._ctx)
        return np.ctypeslib.as_array(pointer, shape=(rows, self.n_vocab))

    def close(self) -> None:
        """Free the context and the model. Closing twice is allowed."""
        if self._ctx is not None:
            llama_cpp.llama_free(self._ctx)
            self._ctx = None
        if self._model is not None:
            llama_cpp.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> LlamaBatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
