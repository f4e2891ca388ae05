"""Twins: llama.cpp runs an artifact's graph on float32 weights, a few layers at a time.

A twin is a temporary GGUF with the artifact's own `llama.*` keys and a slice of its layers
dequantized to float32. Quantized weights make llama.cpp round the activations too, by amounts
that hide real mistakes; a twin has no such noise, so that one tight tolerance holds for every
type. Hidden states enter as embeddings and leave as the last layer's output.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from dsq.convert.checkpoint import GgufCheckpoint
from dsq.convert.gguf.metadata import ARCH, STRING, U32, KeyValue
from dsq.convert.gguf.reader import GgufFile, read_gguf
from dsq.convert.gguf.writer import OutTensor, gguf_layout, write_gguf
from dsq.convert.names import ROPE_FREQS
from dsq.convert.tensors import TensorInfo
from dsq.errors import DsqError, InputError
from dsq.quant import ggml
from dsq.quant.scheme import F32
from dsq.quant.stream import Job, quantize_stream
from dsq.runtime import llama_log

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

SLICE_BYTES = 1 << 30  # float32 weights of one twin; a single larger layer stands alone
_STAND_IN_ROWS = 32  # a twin that has no head still needs an embedding; any will do


@dataclass(frozen=True)
class Slice:
    """Layers [first, stop); `head` asks for final norm and logits."""

    first: int
    stop: int
    head: bool


def slices(layer_bytes: int, n_layer: int, head_bytes: int) -> list[Slice]:
    """Cut a model into as few slices as SLICE_BYTES allows."""
    each = max(1, SLICE_BYTES // layer_bytes)
    if n_layer * layer_bytes + head_bytes <= SLICE_BYTES:
        each = n_layer
    starts = range(0, n_layer, each)
    return [Slice(i, min(i + each, n_layer), i + each >= n_layer) for i in starts]


@contextmanager
def twin(artifact: GgufCheckpoint, part: Slice, threads: int) -> Iterator[GgufFile]:
    """The twin of a slice, on disk for as long as the context lasts."""
    jobs = list(_jobs(artifact, part))
    tensors = [OutTensor(j.name, shape, F32, 4 * int(np.prod(shape))) for j, shape in jobs]
    layout = gguf_layout(_entries(artifact.gguf, part, tensors), tensors)
    with TemporaryDirectory(prefix="dsq-verify-") as folder:
        free = shutil.disk_usage(folder).free
        if layout.data_bytes > free:
            raise DsqError(
                f"{Path(folder).parent} has {free / 2**30:.1f} GiB free, but layers in float32 "
                f"need {layout.data_bytes / 2**30:.1f} GiB; set TMPDIR to a larger disk"
            )
        path = Path(folder) / "twin.gguf"
        write_gguf(path, layout, quantize_stream((j for j, _ in jobs), threads=threads))
        yield read_gguf(path)


def _entries(gguf: GgufFile, part: Slice, tensors: Sequence[OutTensor]) -> list[KeyValue]:
    own = {f"{ARCH}.block_count", f"{ARCH}.vocab_size"}
    rows = next(t.shape[0] for t in tensors if t.name == "token_embd.weight")
    return [
        *(
            KeyValue(key, value, *gguf.metadata_types[key])
            for key, value in gguf.metadata.items()
            if key.startswith(f"{ARCH}.") and key not in own
        ),
        KeyValue(f"{ARCH}.block_count", part.stop - part.first, U32),
        KeyValue(f"{ARCH}.vocab_size", rows, U32),
        KeyValue("tokenizer.ggml.model", "none", STRING),
    ]


def _jobs(artifact: GgufCheckpoint, part: Slice) -> Iterator[tuple[Job, tuple[int, ...]]]:
    def job(name: str, info: TensorInfo) -> tuple[Job, tuple[int, ...]]:
        raw = artifact.data(info.name).reshape(-1, info.type.row_bytes(info.n_per_row))
        return Job(name, raw, info.type, F32, info.n_per_row), info.shape

    tensors = artifact.tensors
    n_embd = artifact.spec.n_embd
    if part.head:
        # The head as a tied embedding: nothing is looked up in it, hidden states come in.
        head = "token_embd.weight" if artifact.spec.tied else "output.weight"
        yield job("token_embd.weight", _tensor(artifact, head))
        yield job("output_norm.weight", _tensor(artifact, "output_norm.weight"))
    else:
        for name, rows in (("token_embd.weight", _STAND_IN_ROWS), ("output_norm.weight", 1)):
            shape = (rows, n_embd) if rows > 1 else (n_embd,)
            raw = np.zeros((rows, 4 * n_embd), np.uint8)
            yield Job(name, raw, F32, F32, n_embd), shape
    if ROPE_FREQS in tensors:
        yield job(ROPE_FREQS, tensors[ROPE_FREQS])
    for layer in range(part.first, part.stop):
        prefix = f"blk.{layer}."
        for name, info in tensors.items():
            if name.startswith(prefix):
                yield job(f"blk.{layer - part.first}.{name.removeprefix(prefix)}", info)


def _tensor(artifact: GgufCheckpoint, name: str) -> TensorInfo:
    info = artifact.tensors.get(name)
    if info is None:
        raise InputError(f"{artifact.path}: tensor {name!r} is missing")
    return info


def embedding_rows(artifact: GgufCheckpoint, ids: Ints) -> Floats:
    """The artifact's embedding of `ids` (n, n_embd), dequantized."""
    info = _tensor(artifact, "token_embd.weight")
    raw = artifact.data(info.name).reshape(-1, info.type.row_bytes(info.n_per_row))
    if len(ids) and int(ids.max()) >= len(raw):
        raise InputError(f"token {int(ids.max())} has no row in the embedding of {len(raw)} rows")
    return ggml.dequantize(raw[ids], info.type, info.n_per_row)


class LlamaGraph:
    """A model in llama.cpp for exact work: CPU, float32 KV cache, no flash attention.

    With `tap` the output of that layer is kept at each decode. Two sequences share one cache:
    0 is computed with, 1 holds a token that is to be joined to it.
    """

    def __init__(self, path: Path, *, n_tokens: int, threads: int, tap: int | None = None) -> None:
        self._model = self._ctx = None
        self._path = path
        self._tap = b"" if tap is None else f"l_out-{tap}".encode()
        self._tapped: list[Floats] = []
        self._failed: str | None = None
        llama_log.install(False)
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = 0
        model.use_extra_bufts = False  # repacked weights would take their size in memory again
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), model)
        if not self._model:
            raise DsqError(f"llama.cpp cannot load it: {llama_log.last_errors()}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = -(-2 * n_tokens // 256) * 256
        params.n_batch = params.n_ubatch = max(n_tokens, 32)  # one graph a decode
        params.n_seq_max, params.kv_unified = 2, True
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = 0
        params.type_k = params.type_v = F32.id
        params.offload_kqv = params.op_offload = False
        params.no_perf = True
        self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._on_tensor)
        if tap is not None:
            params.cb_eval = self._callback
        self._ctx = llama_cpp.llama_init_from_model(self._model, params)
        if not self._ctx:
            self.close()
            raise DsqError(f"llama.cpp cannot make a context: {llama_log.last_errors()}")
        self._memory = llama_cpp.llama_get_memory(self._ctx)
        self.n_embd = int(llama_cpp.llama_model_n_embd(self._model))
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(vocab))

    def _on_tensor(self, tensor: Any, ask: bool, _: Any) -> bool:
        lib = _base()
        if lib.ggml_get_name(tensor) != self._tap:
            return not ask
        if not ask:
            out = np.empty(lib.ggml_nbytes(tensor) // 4, np.float32)
            lib.ggml_backend_tensor_get(tensor, out.ctypes.data, 0, out.nbytes)
            self._tapped.append(out.reshape(-1, self.n_embd))
        return True

    def decode(self, inputs: Floats | Ints, pos0: int, sequence: int = 0) -> tuple[Floats, Floats]:
        """Append tokens, given as embeddings (n, n_embd) or ids (n,), at pos0, pos0 + 1, …

        A sequence may begin anywhere, and continues at its last position + 1. Returns logits
        (n, n_vocab), and the tapped layer's output (n, n_embd), empty without a tap.
        """
        n = len(inputs)
        self._tapped.clear()
        batch = llama_cpp.llama_batch()
        fields = dict(llama_cpp.llama_batch._fields_)
        sequences = np.full(n, sequence, np.int32)
        pointers = sequences.ctypes.data + 4 * np.arange(n, dtype=np.uintp)
        arrays: dict[str, npt.NDArray[Any]] = {
            "token" if inputs.dtype == np.int32 else "embd": np.ascontiguousarray(inputs),
            "pos": np.arange(pos0, pos0 + n, dtype=np.int32),
            "n_seq_id": np.ones(n, np.int32),
            "seq_id": pointers,
            "logits": np.ones(n, np.int8),
        }
        batch.n_tokens = n
        for name, array in arrays.items():
            setattr(batch, name, ctypes.cast(array.ctypes.data, fields[name]))
        code = llama_cpp.llama_decode(self._ctx, batch)
        if code:
            raise DsqError(f"llama_decode failed ({code}): {llama_log.last_errors()}")
        pointer = llama_cpp.llama_get_logits(self._ctx)
        logits = np.ctypeslib.as_array(pointer, shape=(n, self.n_vocab)).copy()
        if self._tap and len(self._tapped) != 1:
            raise DsqError(f"llama.cpp computed no {self._tap.decode()}; its graph has changed")
        return logits, self._tapped[0] if self._tap else np.empty((0, self.n_embd), np.float32)

    def join(self, source: int, target: int) -> None:
        """Let sequence `target` see all tokens of `source`."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, True)

    def close(self) -> None:
        if self._ctx:
            llama_cpp.llama_free(self._ctx)
            self._ctx = None
        if self._model:
            llama_cpp.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> LlamaGraph:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _base() -> Any:
    """libggml-base with the three calls that read a tensor during a computation."""
    lib = ggml.library()
    if lib.ggml_get_name.restype is not ctypes.c_char_p:
        lib.ggml_get_name.argtypes = [ctypes.c_void_p]
        lib.ggml_nbytes.argtypes = [ctypes.c_void_p]
        lib.ggml_nbytes.restype = ctypes.c_size_t
        lib.ggml_backend_tensor_get.restype = None
        lib.ggml_backend_tensor_get.argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_size_t,
        ]
        lib.ggml_get_name.restype = ctypes.c_char_p
    return lib
