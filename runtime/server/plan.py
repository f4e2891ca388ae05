"""What a model gets before it is loaded: its context, and the memory that it will take.

Headers only; llama.cpp's sums are `dsq fit`'s (dsq.runtime.fit).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint, open_checkpoint
from dsq.convert.spec import ModelSpec
from dsq.errors import InputError, UnsupportedError
from dsq.runtime.fit import PROCESS_BYTES, Limits, Placement, Weights, place, weights_of
from dsq.runtime.server.draft_check import check_draft
from dsq.runtime.server.engines import EngineOptions
from dsq.runtime.server.sequences import MOST_PARKED

if TYPE_CHECKING:
    from dsq.runtime.server.llama_batch import LlamaSettings

DEFAULT_CTX = 4096  # a 16k cache of a 6.7b would take 8 GiB unasked
LEAST_CTX = 512  # below it nothing is chosen by itself
N_BATCH = 512  # tokens of one step
_EVERYTHING = Limits(ram=1 << 62)
_TORCH_BYTES = 700 << 20  # torch, transformers and what they keep


def plan_llama(path: Path, options: EngineOptions, free: int) -> tuple[EngineOptions, int]:
    """The options with a context, and the bytes of memory that the worker will take.

    `n_ctx` 0 becomes DEFAULT_CTX or the model's own, halved until weights, cache and buffers fit in
    `free` bytes, though not below LEAST_CTX: what does not fit then is for the caller to refuse.
    With layers on a GPU nothing is halved, and 0 says that nothing was estimated. With
    `auto_layers` as many go there as the first card's free memory holds.
    Raises InputError for a context beyond what the model was trained on, and for layers on a GPU
    where llama.cpp was built without one.
    """
    options = replace(options, n_gpu_layers=_layers(path, options))
    llama_settings(path, options)  # refuses what llama.cpp does not take
    try:
        checkpoint = open_checkpoint(path)
    except UnsupportedError:  # of an architecture that dsq runs and does not convert
        return replace(options, n_ctx=options.n_ctx or DEFAULT_CTX), path.stat().st_size
    spec = checkpoint.spec
    if options.n_gpu_layers:
        planned = replace(options, n_ctx=_context(path, spec, options))
        if options.draft is not None:
            check_draft(path, options.draft, planned.n_ctx)
        return planned, 0
    weights = _weights(checkpoint)
    draft = open_checkpoint(options.draft) if options.draft else None

    def n_bytes(n_cells: int) -> int:
        total = _llama_bytes(spec, weights, options, n_cells)
        if draft is not None:
            total += _llama_bytes(draft.spec, _weights(draft), options, n_cells) - PROCESS_BYTES
        return total + min(MOST_PARKED, int(n_cells * spec.kv_bytes_per_token()))  # parked

    planned, total = _most_that_fits(path, spec, options, free, n_bytes)
    if options.draft is not None:
        check_draft(path, options.draft, planned.n_ctx)
    return planned, total


def _weights(checkpoint: HfCheckpoint | GgufCheckpoint) -> Weights:
    sizes = {name: tensor.n_bytes for name, tensor in checkpoint.tensors.items()}
    return weights_of(checkpoint.spec, sizes)


def llama_settings(path: Path, options: EngineOptions) -> LlamaSettings:
    from dsq.runtime.server.llama_batch import LlamaSettings

    return LlamaSettings(
        str(path),
        n_ctx=options.n_ctx,
        kv_size=options.kv_size,
        n_parallel=options.n_parallel or LlamaSettings.n_parallel,
        n_batch=N_BATCH,
        n_threads=options.n_threads,
        n_gpu_layers=options.n_gpu_layers,
        kv_type=options.kv_type or "f16",
        n_draft=LlamaSettings.n_draft if options.lookup else 0,
        draft_path=str(options.draft or ""),
    )


def plan_torch(path: Path, options: EngineOptions, free: int) -> tuple[EngineOptions, int]:
    """As `plan_llama`, for a directory in torch: float32, or the packed files as they are.

    With a CUDA card, which torch takes, nothing is estimated.
    """
    from dsq.runtime.devices import cards

    _refuse(options, "torch")
    if options.kv_type is not None:
        raise InputError(
            f"--kv-type {options.kv_type}: torch keeps its cache in the type that it computes in; "
            "leave --kv-type out"
        )
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, HfCheckpoint), "the engine takes directories"
    spec = checkpoint.spec
    if cards():
        return replace(options, n_ctx=_context(path, spec, options)), 0
    return _most_that_fits(
        path, spec, options, free, lambda n_cells: _torch_bytes(checkpoint, n_cells)
    )


def plan_card(path: Path, options: EngineOptions) -> tuple[EngineOptions, int]:
    """For engines that run on a CUDA card alone: they say what it cannot hold."""
    _refuse(options, "an engine on a CUDA card")
    return replace(options, n_ctx=_context(path, open_checkpoint(path).spec, options)), 0


def _layers(path: Path, options: EngineOptions) -> int:
    """Layers on the card: as asked, or with `auto_layers` as many as `dsq fit` would put there."""
    if not (options.n_gpu_layers or options.auto_layers):
        return 0
    import llama_cpp

    from dsq.runtime import devices

    can = llama_cpp.llama_supports_gpu_offload()
    if options.n_gpu_layers:
        if not can:
            raise InputError(
                f"-ngl {options.n_gpu_layers}: llama-cpp-python was built without a GPU; leave "
                f"-ngl out, or build it with one: {devices.LLAMA_CPP_CUDA}"
            )
        return options.n_gpu_layers
    cards = devices.cards() if can else []
    if not cards:
        return 0
    try:
        checkpoint = open_checkpoint(path)
    except UnsupportedError:  # its layers cannot be weighed
        return 0
    spec = checkpoint.spec
    cells = max(options.kv_size, _context(path, spec, options))
    limits = replace(_EVERYTHING, vram=cards[0].vram_free)
    placed = place(spec, _weights(checkpoint), limits, cells, options.kv_type or "f16")
    return placed.n_gpu_layers if isinstance(placed, Placement) else 0


def _refuse(options: EngineOptions, who: str) -> None:
    """What llama.cpp alone has."""
    if options.n_gpu_layers:
        raise InputError(
            f"-ngl {options.n_gpu_layers}: layers are counted by llama.cpp alone; {who} puts the "
            "whole model on the card: leave -ngl out"
        )
    if options.draft is not None:
        raise InputError(
            f"--draft {options.draft}: draft models run in llama.cpp alone; leave --draft out"
        )


def _context(path: Path, spec: ModelSpec, options: EngineOptions) -> int:
    """As asked, or the default."""
    if options.n_ctx > spec.n_ctx:
        raise InputError(
            f"-c {options.n_ctx}: {path.name} was trained on {spec.n_ctx} tokens; give at most that"
        )
    return options.n_ctx or min(DEFAULT_CTX, spec.n_ctx)


def _most_that_fits(
    path: Path,
    spec: ModelSpec,
    options: EngineOptions,
    free: int,
    n_bytes_with: Callable[[int], int],
) -> tuple[EngineOptions, int]:
    n_ctx = _context(path, spec, options)
    while True:
        n_bytes = n_bytes_with(max(options.kv_size, n_ctx))
        asked_for = options.n_ctx or options.kv_size
        if n_bytes <= free or asked_for or n_ctx // 2 < LEAST_CTX:
            return replace(options, n_ctx=n_ctx), n_bytes
        n_ctx //= 2


def _llama_bytes(spec: ModelSpec, weights: Weights, options: EngineOptions, n_cells: int) -> int:
    """Weights, the cache that all requests share, the graph's buffers, and a batch's logits."""
    placed = place(spec, weights, _EVERYTHING, n_cells, options.kv_type or "f16")
    assert isinstance(placed, Placement), "there is room for everything"
    logits = 4 * N_BATCH * spec.n_vocab  # of a whole batch: `echo` with `logprobs`
    return placed.ram + logits


def _torch_bytes(checkpoint: HfCheckpoint, n_cells: int) -> int:
    """In float32: weights, cache, and of one batch the widest states, attention and logits."""
    spec = checkpoint.spec
    sizes = [t.n_elements for t in checkpoint.tensors.values()]
    if checkpoint.packed is None:
        weights = 4 * sum(sizes)
    else:  # mapped as stored, and one matrix of codes
        weights = sum(checkpoint.stored_as(name)[1] for name in checkpoint.tensors) + max(sizes)
    cache = 2 * 4 * spec.n_layer * n_cells * spec.n_head_kv * spec.head_dim
    # Keys and values repeated for each head, and the mask in float32.
    attention = 2 * 4 * n_cells * spec.n_head * spec.head_dim + 4 * N_BATCH * n_cells
    states = 4 * N_BATCH * (3 * spec.n_ff + 6 * spec.n_embd + spec.n_vocab)
    return _TORCH_BYTES + weights + cache + attention + states
