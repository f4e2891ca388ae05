"""What a model gets before it is loaded: its context, and the memory that it will take.

Headers only; the sums are `dsq fit`'s (dsq.runtime.fit).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.spec import ModelSpec
from dsq.errors import InputError, UnsupportedError
from dsq.runtime.fit import Limits, Placement, Weights, place, weights_of
from dsq.runtime.server.llama_batch import LlamaSettings

DEFAULT_CTX = 4096  # a 16k cache of a 6.7b would take 8 GiB unasked
LEAST_CTX = 512  # below it nothing is chosen by itself
_EVERYTHING = Limits(ram=1 << 62)


def plan_server(path: Path, settings: LlamaSettings, free: int) -> tuple[LlamaSettings, int]:
    """The settings with path and context, and the bytes of memory that the worker will take.

    `n_ctx` 0 becomes DEFAULT_CTX or the model's own, halved until weights, cache and buffers fit in
    `free` bytes, though not below LEAST_CTX: what does not fit then is for the caller to refuse.
    With layers on a GPU nothing is halved, and 0 says that nothing was estimated.
    Raises InputError for a context beyond what the model was trained on.
    """
    settings = replace(settings, path=str(path))
    try:
        checkpoint = open_checkpoint(path)
    except UnsupportedError:  # of an architecture that dsq runs and does not convert
        return replace(settings, n_ctx=settings.n_ctx or DEFAULT_CTX), path.stat().st_size
    spec = checkpoint.spec
    if settings.n_ctx > spec.n_ctx:
        raise InputError(
            f"-c {settings.n_ctx}: {path.name} was trained on {spec.n_ctx} tokens; "
            "give at most that"
        )
    weights = weights_of(spec, {name: t.n_bytes for name, t in checkpoint.tensors.items()})
    n_ctx = settings.n_ctx or min(DEFAULT_CTX, spec.n_ctx)
    if settings.n_gpu_layers:
        return replace(settings, n_ctx=n_ctx), 0
    while True:
        planned = replace(settings, n_ctx=n_ctx)
        n_bytes = memory_bytes(spec, weights, planned)
        asked_for = settings.n_ctx or settings.kv_size
        if n_bytes <= free or asked_for or n_ctx // 2 < LEAST_CTX:
            return planned, n_bytes
        n_ctx //= 2


def memory_bytes(spec: ModelSpec, weights: Weights, settings: LlamaSettings) -> int:
    """Weights, the cache that all requests share, the graph's buffers, and a batch's logits."""
    cells = max(settings.kv_size, settings.n_ctx)
    placed = place(spec, weights, _EVERYTHING, cells, settings.kv_type)
    assert isinstance(placed, Placement), "there is room for everything"
    logits = 4 * settings.n_batch * spec.n_vocab  # of a whole batch: `echo` with `logprobs`
    return placed.ram + logits
