"""LlamaCppEngine: a GGUF file run by llama.cpp, through llama-cpp-python's low-level calls.

The high-level `Llama` class tokenizes with llama.cpp's own tokenizer, hides batches of several
sequences and copies logits in Python; dsq needs none of the three.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import llama_cpp
import numpy as np
import numpy.typing as npt

from dsq.errors import DsqError, InputError
from dsq.quant.scheme import ggml_type
from dsq.quant.threads import free_cores
from dsq.runtime import llama_log
from dsq.runtime.engine import Floats

if TYPE_CHECKING:
    from typing_extensions import Self

    from dsq.tokenizer_port.tokenizer import Tokenizer

Ints = npt.NDArray[np.int32]
FlashAttention = bool | Literal["auto"]
FLASH_ATTENTION = {"auto": -1, False: 0, True: 1}  # enum llama_flash_attn_type


class LlamaModel:
    """A GGUF loaded by llama.cpp and, once opened, its context; both are freed together.

    Raises InputError for a file that is no model or a build that cannot do what is asked.
    """

    def __init__(self, path: str | Path, *, n_gpu_layers: int, verbose: bool = False) -> None:
        self._model: Any = None
        self._ctx: Any = None  # both there before anything can fail, for close()
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"{path}: no such file")
        if n_gpu_layers and not llama_cpp.llama_supports_gpu_offload():
            raise InputError(
                f"{n_gpu_layers} layers asked for the GPU, but llama-cpp-python was built without "
                "one; reinstall it with CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall "
                "--no-cache-dir llama-cpp-python, or ask for 0"
            )
        llama_log.install(verbose)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._model:
            raise InputError(f"{self.path}: llama.cpp cannot load it: {llama_log.last_errors()}")
        self.vocab: Any = llama_cpp.llama_model_get_vocab(self._model)
        self._n_vocab = int(llama_cpp.llama_vocab_n_tokens(self.vocab))
        self.n_ctx_train = int(llama_cpp.llama_model_n_ctx_train(self._model))

    @property
    def n_vocab(self) -> int:
        return self._n_vocab

    def _open(
        self, params: llama_cpp.llama_context_params, kv_type: str, flash: FlashAttention
    ) -> None:
        """Make the context; a failure frees everything."""
        params.flash_attn_type = FLASH_ATTENTION[flash]
        params.type_k = params.type_v = ggml_type(kv_type).id
        params.no_perf = True
        self._ctx = llama_cpp.llama_init_from_model(self._model, params)
        if not self._ctx:
            self.close()
            raise DsqError(
                f"{self.path}: llama.cpp cannot make a context of {params.n_ctx} tokens with a "
                f"{kv_type} KV cache: {llama_log.last_errors() or 'out of memory?'}"
            )
        self._memory = llama_cpp.llama_get_memory(self._ctx)

    def _evaluate(self, batch: llama_cpp.llama_batch) -> None:
        code = llama_cpp.llama_decode(self._ctx, batch)
        if code:
            reason = "its KV cache is full" if code == 1 else llama_log.last_errors()
            raise DsqError(f"{self.path}: llama_decode failed ({code}): {reason}")

    def close(self) -> None:
        """Closing twice is allowed."""
        if self._ctx is not None:
            llama_cpp.llama_free(self._ctx)
            self._ctx = None
        if self._model is not None:
            llama_cpp.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_ctx"):
            self.close()


class LlamaCppEngine(LlamaModel):
    """One model and one context. See `dsq.runtime.engine.Engine` for the methods' meaning.

    `n_ctx` tokens per sequence; 0 takes the model's training context. `kv_type` is the KV cache's
    type (f16, f32, bf16, q8_0, …). `n_seq_max` windows of `n_ctx` fit at once.
    Raises InputError for a file that is no model or a build that cannot do what is asked.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        n_ctx: int = 0,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        n_gpu_layers: int = 0,
        kv_type: str = "f16",
        flash_attention: FlashAttention = "auto",
        n_seq_max: int = 1,
        verbose: bool = False,
    ) -> None:
        if n_ctx < 0:
            raise InputError(f"n_ctx is {n_ctx}; give a positive number, or 0 for the model's own")
        super().__init__(path, n_gpu_layers=n_gpu_layers, verbose=verbose)
        self._n_ctx = n_ctx or self.n_ctx_train
        if self._n_ctx > self.n_ctx_train:
            warnings.warn(
                f"{path}: a context of {n_ctx} tokens exceeds the {self.n_ctx_train} that the "
                "model was trained on; later tokens may be nonsense",
                stacklevel=2,
            )
        self._n_seq = n_seq_max
        self._n_batch = min(n_batch, self._n_ctx * n_seq_max)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self._n_ctx * n_seq_max
        params.n_batch = self._n_batch
        params.n_ubatch = min(n_ubatch, self._n_batch)
        params.n_seq_max = n_seq_max
        params.n_threads = params.n_threads_batch = n_threads or free_cores()
        self._open(params, kv_type, flash_attention)
        self._tokens: list[int] = []
        self._batch = Batch(self._n_batch)

    @property
    def n_ctx(self) -> int:
        return self._n_ctx

    @property
    def max_windows(self) -> int:
        return self._n_seq

    @cached_property
    def tokenizer(self) -> Tokenizer:
        from dsq.convert.gguf.reader import read_gguf
        from dsq.tokenizer_port.load import vocabulary_from_gguf
        from dsq.tokenizer_port.tokenizer import Tokenizer

        metadata = read_gguf(self.path).metadata
        return Tokenizer.from_vocabulary(vocabulary_from_gguf(metadata, allow_default=True))

    @property
    def n_past(self) -> int:
        # The cache is asked, not a counter: a KeyboardInterrupt may fall between the two.
        return int(llama_cpp.llama_memory_seq_pos_max(self._memory, 0)) + 1

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(self._tokens[: self.n_past])

    def truncate(self, n_tokens: int) -> None:
        if not llama_cpp.llama_memory_seq_rm(self._memory, 0, n_tokens, -1):
            raise DsqError(f"{self.path}: this model cannot forget a part of its sequence")
        del self._tokens[n_tokens:]

    def eval(self, tokens: Sequence[int]) -> Floats:
        row: Floats = self.logits(tokens, pos0=self.n_past, all=False)[0]
        return row

    def logits(self, tokens: Sequence[int], *, pos0: int = 0, all: bool = True) -> Floats:
        ids = self._check(np.asarray(tokens, np.int32))
        end = pos0 + len(ids)
        if not len(ids):
            raise InputError("no tokens to evaluate")
        if pos0 > self.n_past:
            raise ValueError(f"pos0 is {pos0}, but the sequence has {self.n_past} tokens")
        if end > self._n_ctx:
            raise InputError(
                f"{end} tokens do not fit a context of {self._n_ctx}; "
                "raise n_ctx or shorten the input"
            )
        self.truncate(pos0)
        self._tokens[pos0:] = [int(i) for i in ids]
        wanted = np.zeros(len(ids), np.int8)
        wanted[0 if all else -1 :] = 1
        positions = np.arange(pos0, end, dtype=np.int32)
        return self._decode(ids, positions, np.zeros_like(ids), wanted)

    def window_logits(self, windows: Ints, first: int) -> Floats:
        n, length = windows.shape
        if n > self._n_seq or length > self._n_ctx:
            raise ValueError(f"{n} windows of {length} exceed {self._n_seq} of {self._n_ctx}")
        self._tokens.clear()
        llama_cpp.llama_memory_clear(self._memory, False)
        wanted = np.zeros((n, length), np.int8)
        wanted[:, first : length - 1] = 1
        positions = np.tile(np.arange(length, dtype=np.int32), n)
        sequences = np.repeat(np.arange(n, dtype=np.int32), length)
        result = self._decode(self._check(windows.ravel()), positions, sequences, wanted.ravel())
        llama_cpp.llama_memory_clear(self._memory, False)
        return result

    def _check(self, ids: Ints) -> Ints:
        if len(ids) and not (ids.min() >= 0 and ids.max() < self._n_vocab):
            bad = int(ids.min() if ids.min() < 0 else ids.max())
            raise InputError(f"{self.path}: token {bad} is outside its {self._n_vocab} tokens")
        return ids

    def _decode(
        self, ids: Ints, positions: Ints, sequences: Ints, wanted: npt.NDArray[np.int8]
    ) -> Floats:
        """Evaluate; one row of logits per wanted token. A view when one batch held them all."""
        parts: list[Floats] = []
        for start in range(0, len(ids), self._n_batch):
            part = slice(start, start + self._n_batch)
            batch = self._batch.fill(ids[part], positions[part], sequences[part], wanted[part])
            self._evaluate(batch)
            rows = int(wanted[part].sum())
            if rows:
                pointer = llama_cpp.llama_get_logits(self._ctx)
                view = np.ctypeslib.as_array(pointer, shape=(rows, self._n_vocab))
                parts.append(view if len(ids) <= self._n_batch else view.copy())
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Batch:
    """A llama_batch over numpy arrays: filled by slices, not by a Python loop over tokens."""

    def __init__(self, size: int) -> None:
        self._token = np.zeros(size, np.int32)
        self._pos = np.zeros(size, np.int32)
        self._seq = np.zeros(size, np.int32)
        self._wanted = np.zeros(size, np.int8)
        self._n_seq = np.ones(size, np.int32)
        base, step = self._seq.ctypes.data, self._seq.itemsize
        self._seq_ptr = np.arange(base, base + step * size, step, dtype=np.uintp)
        fields = dict(llama_cpp.llama_batch._fields_)
        self._batch = llama_cpp.llama_batch()
        for name, array in (
            ("token", self._token),
            ("pos", self._pos),
            ("n_seq_id", self._n_seq),
            ("seq_id", self._seq_ptr),
            ("logits", self._wanted),
        ):
            setattr(self._batch, name, ctypes.cast(array.ctypes.data, fields[name]))

    def fill(
        self, ids: Ints, positions: Ints, sequences: Ints, wanted: npt.NDArray[np.int8]
    ) -> llama_cpp.llama_batch:
        n = len(ids)
        self._token[:n], self._pos[:n], self._seq[:n] = ids, positions, sequences
        self._wanted[:n] = wanted
        self._batch.n_tokens = n
        return self._batch
