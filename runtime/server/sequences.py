"""What the loop asks of whatever runs a model: many sequences, batches in and logits out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from dsq.runtime.engine import Floats

MOST_PARKED = 256 << 20  # bytes of idle sequences kept beside the cache; see `Parking`


class LoopSettings(Protocol):
    """See `LlamaSettings`."""

    @property
    def path(self) -> str: ...
    @property
    def n_parallel(self) -> int: ...
    @property
    def n_prefixes(self) -> int: ...
    @property
    def n_batch(self) -> int: ...
    @property
    def n_draft(self) -> int: ...
    @property
    def gap_ms(self) -> float: ...


class SequenceModel(Protocol):
    """See `LlamaBatch`. `context` and `vocab` are llama.cpp's, for its samplers; a `context` of
    None means that the samplers get the logits."""

    n_ctx: int
    n_ctx_train: int
    kv_size: int
    kv_type: str
    n_parameters: int
    size_bytes: int

    @property
    def n_vocab(self) -> int: ...
    @property
    def vocab(self) -> Any: ...
    @property
    def context(self) -> Any: ...
    def remove(self, sequence: int, start: int) -> None: ...
    def copy(self, source: int, target: int, n: int) -> None: ...
    def clear(self) -> None: ...
    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int],
        wanted: Sequence[int],
    ) -> Floats: ...
    def close(self) -> None: ...
