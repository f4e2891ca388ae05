"""A model on disk, GGUF file or Hugging Face directory: its vocabulary, size and engine.

A GPTQ or EXL2 directory is one of the latter; the torch engine runs its exact codes.
"""

from __future__ import annotations

import shlex
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsq.errors import InputError
from dsq.runtime.reference_cache import file_identity

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dsq.convert.tensors import TensorInfo
    from dsq.runtime.engine import Engine
    from dsq.tokenizer_port.vocabulary import Vocabulary


@dataclass(frozen=True)
class EngineSettings:
    """How to run a model. The last two concern llama.cpp only."""

    n_ctx: int = 0  # 0: what the model was trained on
    n_threads: int | None = None
    n_gpu_layers: int = 0
    kv_type: str = "f16"


class Source:
    """Nothing is loaded before it is asked for."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise InputError(f"{path}: no such file or directory")
        if self.path.is_dir() and not (self.path / "config.json").is_file():
            from dsq.convert.checkpoint import open_checkpoint

            self.path = open_checkpoint(self.path).path  # the one GGUF in there
        self.is_gguf = not self.path.is_dir()
        self._warned = False

    @cached_property
    def _opened(self) -> Any:
        # A GGUF of any architecture can be measured, so it is read without a ModelSpec.
        if self.is_gguf:
            from dsq.convert.gguf.reader import read_gguf

            return read_gguf(self.path)
        from dsq.convert.checkpoint import open_checkpoint

        return open_checkpoint(self.path)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        if not self.is_gguf:
            vocabulary: Vocabulary = self._opened.vocabulary()
            return vocabulary
        from dsq.tokenizer_port.load import vocabulary_from_gguf

        self._warn_of_faults()
        return vocabulary_from_gguf(self._opened.metadata, allow_default=True)

    def _warn_of_faults(self) -> None:
        """Say once what `dsq doctor` finds in a GGUF that another program made."""
        metadata = self._opened.metadata
        if self._warned or "tokenizer.huggingface.json" in metadata:
            return
        self._warned = True
        from dsq.convert.doctor import diagnose

        faults = diagnose(metadata, self._opened.tensors, thorough=False).serious
        if faults:
            count = "a fault" if len(faults) == 1 else f"{len(faults)} faults"
            warnings.warn(
                f"{self.path}: {count} of its conversion change{'s' * (len(faults) == 1)} what it "
                f"answers: {faults[0].wrong}; see and mend: "
                f"dsq doctor {shlex.quote(str(self.path))} --fix OUT",
                stacklevel=2,
            )

    @cached_property
    def _tensors(self) -> list[TensorInfo]:
        tensors: Mapping[str, TensorInfo] = self._opened.tensors
        return [t for t in tensors.values() if t.name != "rope_freqs.weight"]

    @property
    def packed_method(self) -> str | None:
        """`gptq` or `exl2` of such a directory, None of every other model."""
        packed = None if self.is_gguf else self._opened.packed
        return None if packed is None else str(packed.method)

    @property
    def files(self) -> list[Path]:
        """The files that hold weights."""
        if self.packed_method:
            return sorted(self._opened.files)
        return sorted({tensor.path for tensor in self._tensors})

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    @property
    def bpw(self) -> float:
        """Bits a weight as stored, over all tensors; scales, zero points and the like count."""
        n_bytes = sum(t.n_bytes for t in self._tensors)
        if self.packed_method:
            n_bytes = sum(self._opened.stored_as(t.name)[1] for t in self._tensors)
        return 8 * n_bytes / sum(t.n_elements for t in self._tensors)

    @property
    def identity(self) -> str:
        """Changes when the model's files or the library that runs it change."""
        if self.is_gguf:
            import llama_cpp

            return f"llama.cpp {llama_cpp.__version__} {file_identity(self.files)}"
        from importlib.metadata import version

        from dsq.runtime.torch_engine import require_torch

        require_torch(self.path)
        configs = [self.path / name for name in ("config.json", "quantize_config.json")]
        libraries = f"torch {version('torch')} transformers {version('transformers')}"
        return f"{libraries} {file_identity([*self.files, *filter(Path.is_file, configs)])}"

    def engine(self, settings: EngineSettings) -> Engine:
        """Load the model for one sequence of `n_ctx` tokens."""
        if self.is_gguf:
            return self._llama(settings, n_batch=512, n_seq_max=1)
        from dsq.runtime.torch_engine import TorchEngine

        return TorchEngine(self.path, n_ctx=settings.n_ctx, n_threads=settings.n_threads)

    def window_engine(self, settings: EngineSettings) -> Engine:
        """Load the model for windows of `n_ctx`: as many at once as llama-perplexity takes."""
        if not self.is_gguf:
            return self.engine(settings)
        n_batch = 2048
        return self._llama(settings, n_batch, n_seq_max=max(1, n_batch // settings.n_ctx))

    def _llama(self, settings: EngineSettings, n_batch: int, n_seq_max: int) -> Engine:
        from dsq.convert.inspect import check_has_weights

        check_has_weights(self._opened)  # before llama.cpp is loaded, which says less
        from dsq.runtime.llamacpp import LlamaCppEngine

        self._warn_of_faults()
        return LlamaCppEngine(
            self.path,
            n_ctx=settings.n_ctx,
            n_batch=n_batch,
            n_seq_max=n_seq_max,
            n_threads=settings.n_threads,
            n_gpu_layers=settings.n_gpu_layers,
            kv_type=settings.kv_type,
        )
