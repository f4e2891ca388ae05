"""A vocabulary for llama.cpp's samplers in engines that are not llama.cpp.

The samplers run on any logits; grammars need the tokens' texts, which llama.cpp reads from the GGUF
that dsq would write of the vocabulary.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp

from dsq.errors import InputError
from dsq.runtime import llama_log

if TYPE_CHECKING:
    from dsq.tokenizer_port.vocabulary import Vocabulary


class LlamaCppVocab:
    """A vocabulary in llama.cpp's hands; `pointer` is what its samplers take.

    Raises InputError for one that llama.cpp cannot read.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        from dsq.convert.gguf.metadata import vocabulary_entries
        from dsq.convert.gguf.writer import gguf_layout, write_gguf

        llama_log.install(verbose=False)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        with tempfile.TemporaryDirectory(prefix="dsq-") as directory:
            path = Path(directory) / "vocabulary.gguf"
            write_gguf(path, gguf_layout(vocabulary_entries(vocabulary), ()), ())
            self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise InputError(
                f"llama.cpp, whose samplers are used, cannot read the model's vocabulary: "
                f"{llama_log.last_errors()}"
            )
        self.pointer: Any = llama_cpp.llama_model_get_vocab(self._model)

    def close(self) -> None:
        """Closing twice is allowed."""
        if self._model is not None:
            llama_cpp.llama_model_free(self._model)
            self._model = self.pointer = None
