"""How a conversation's model is run so that it fits the machine: context, KV type, GPU layers.

Headers only; the sums are `dsq fit`'s, those of a directory in torch `dsq serve`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint, open_checkpoint
from dsq.convert.files import human
from dsq.errors import InputError, UnsupportedError
from dsq.runtime.fit import (
    COARSE_KV,
    Limits,
    Placement,
    Weights,
    best_placement,
    usable_kv_types,
    weights_of,
)
from dsq.runtime.source import EngineSettings

DEFAULT_CTX = 4096  # a 16k cache of a 6.7b would take 8 GiB unasked
LEAST_CTX = 512  # below it nothing is chosen by itself


@dataclass(frozen=True)
class Asked:
    """None: what fits. `n_gpu_layers` None takes what fits on the card, in a build that has one."""

    n_ctx: int | None = None
    kv_type: str | None = None
    n_gpu_layers: int | None = None
    n_threads: int | None = None


@dataclass(frozen=True)
class ChatPlan:
    """`ram` and `vram` in bytes; 0 where nothing was estimated."""

    settings: EngineSettings
    ram: int = 0
    vram: int = 0

    def about(self) -> str:
        s = self.settings
        found = f"context {s.n_ctx:,}, {s.kv_type} cache"
        if s.n_gpu_layers:
            found += f", {'all' if s.n_gpu_layers > 998 else s.n_gpu_layers} layers on the card"
        if self.ram:
            found += f", about {human(self.ram)} of memory"
        return found + (f" and {human(self.vram)} of the card's" if self.vram else "")


def plan_chat(path: Path, asked: Asked, *, engine: str, free: int, card_free: int = 0) -> ChatPlan:
    """What fits in `free` bytes of memory and `card_free` of a card that llama.cpp can use.

    Without a context asked for: DEFAULT_CTX or the model's own, halved until it fits. Raises
    InputError, before anything is loaded, for what does not.
    """
    try:
        checkpoint = open_checkpoint(path)
    except UnsupportedError:  # of an architecture that dsq runs and does not convert
        return ChatPlan(_settings(asked, asked.n_ctx or DEFAULT_CTX, asked.kv_type or "f16", 0))
    if checkpoint.format != "gguf" and (engine == "torch" or not _packed(checkpoint)):
        return _plan_torch(path, asked, free)
    spec = checkpoint.spec
    if asked.n_gpu_layers:  # as asked: llama.cpp says what the card cannot hold
        n_ctx = asked.n_ctx or min(DEFAULT_CTX, spec.n_ctx)
        return ChatPlan(_settings(asked, n_ctx, asked.kv_type or "f16", asked.n_gpu_layers))
    if asked.kv_type is not None and asked.kv_type not in usable_kv_types(spec):
        raise InputError(
            f"--kv-type {asked.kv_type}: heads of {spec.head_dim} values do not divide into its "
            "blocks of 32; use f16"
        )
    weights = _weights(checkpoint)
    limits = Limits(ram=free, vram=0 if asked.n_gpu_layers == 0 else card_free)
    n_ctx = asked.n_ctx or min(DEFAULT_CTX, spec.n_ctx)
    while True:
        smaller = n_ctx // 2 if asked.n_ctx is None and n_ctx // 2 >= LEAST_CTX else None
        # Half the context costs less than a cache of 4 bits.
        usable = usable_kv_types(spec)
        fine = [kv for kv in usable if kv != COARSE_KV] if smaller else usable
        found = best_placement(
            spec, weights, limits, n_ctx, fine if asked.kv_type is None else (asked.kv_type,)
        )
        if isinstance(found, Placement):
            settings = _settings(asked, n_ctx, found.kv_type, found.n_gpu_layers)
            return ChatPlan(settings, found.ram, found.vram)
        if smaller is None:
            raise InputError(
                f"{path.name} {found}; take a smaller context (-c), a quantized cache "
                "(--kv-type q8_0) or a smaller quantization (dsq fit shows them)"
            )
        n_ctx = smaller


def _settings(asked: Asked, n_ctx: int, kv_type: str, n_gpu_layers: int) -> EngineSettings:
    return EngineSettings(n_ctx, asked.n_threads, n_gpu_layers, kv_type)


def _packed(checkpoint: GgufCheckpoint | HfCheckpoint) -> bool:
    return isinstance(checkpoint, HfCheckpoint) and checkpoint.packed is not None


def _weights(checkpoint: GgufCheckpoint | HfCheckpoint) -> Weights:
    """A packed directory's GGUF is not made yet: about as large as what is stored now."""
    spec = checkpoint.spec
    if isinstance(checkpoint, GgufCheckpoint):
        return weights_of(spec, {name: t.n_bytes for name, t in checkpoint.tensors.items()})
    total = sum(checkpoint.stored_as(name)[1] for name in checkpoint.tensors)
    return Weights((total // spec.n_layer,) * spec.n_layer, 0, 0, spec.tied, 0)


def _plan_torch(path: Path, asked: Asked, free: int) -> ChatPlan:
    from dsq.runtime.server.engines import EngineOptions
    from dsq.runtime.server.plan import plan_torch

    options = EngineOptions(n_ctx=asked.n_ctx or 0, kv_type=asked.kv_type)
    planned, n_bytes = plan_torch(path, options, free)
    if n_bytes > free:
        raise InputError(
            f"{path.name} needs {human(n_bytes)} of memory in torch, {human(free)} are there; "
            "convert it to a quantized GGUF, or take a smaller context (-c)"
        )
    return ChatPlan(_settings(asked, planned.n_ctx, "f32", 0), n_bytes)
