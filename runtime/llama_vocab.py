"""llama.cpp's own tokenizer, from the vocabulary of a GGUF: no weights are read."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import numpy as np

from dsq.errors import DsqError, InputError
from dsq.runtime import llama_log
from dsq.tokenizer_port.vocabulary import Vocabulary

_IDS = ctypes.POINTER(llama_cpp.llama_token)


class LlamaVocab:
    """Encodes as llama.cpp does. Raises InputError for a file that llama.cpp cannot read.

    Many pre-tokenizers run on std::regex, which takes about 300 bytes of stack for a character of
    a match: a word of 30,000 letters ends the process on a stack of 8 MiB (see
    `tokenizer_check.on_deep_stack`).
    """

    def __init__(self, path: Path) -> None:
        self._model = None
        llama_log.install(False)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise InputError(f"{path}: llama.cpp cannot load it: {llama_log.last_errors()}")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids; texts of control tokens become the tokens. `add_special` adds BOS, EOS."""
        raw = text.encode()
        out = np.empty(len(raw) + 8, np.int32)  # never more tokens than bytes
        n = llama_cpp.llama_tokenize(
            self._vocab, raw, len(raw), out.ctypes.data_as(_IDS), len(out), add_special, True
        )
        if n < 0:
            raise DsqError(f"llama.cpp cannot tokenize {text[:40]!r} ({n})")
        ids: list[int] = out[:n].tolist()
        return ids

    def close(self) -> None:
        if self._model:
            llama_cpp.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> LlamaVocab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def llama_vocab(vocabulary: Vocabulary) -> Iterator[LlamaVocab]:
    """llama.cpp reading the GGUF that dsq writes of a vocabulary: all its keys, no tensors."""
    from dsq.convert.gguf.metadata import vocabulary_entries
    from dsq.convert.gguf.writer import gguf_layout, write_gguf

    with tempfile.TemporaryDirectory(prefix="dsq-") as directory:
        path = Path(directory) / "vocabulary.gguf"
        write_gguf(path, gguf_layout(vocabulary_entries(vocabulary), ()), ())
        with LlamaVocab(path) as theirs:
            yield theirs
