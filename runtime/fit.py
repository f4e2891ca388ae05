"""Which quantization fits a machine: file, KV cache, layers on the card, speed. No weights read.

A pure plan on shapes and limits. `plan_presets` makes one row a preset, `recommend` takes one and
says why; `plan_file` is the same for a file that exists, for those who load it. What a row claims
never exceeds the limits: that is checked where it is made.

Sizes are exact but for what a CUDA driver takes for itself (`CARD_OVERHEAD`, an assumption that
was not measured here). Weights on the CPU count once; llama.cpp maps the file and may keep a
repacked copy beside it, whose mapped original the system can drop again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from dsq.convert import memory
from dsq.convert.gguf.writer import padded
from dsq.convert.memory import KV_TYPES
from dsq.convert.spec import ModelSpec
from dsq.convert.tensors import TensorInfo
from dsq.errors import InputError
from dsq.quant.plan import ModelShape, PlanTensor, choose_types
from dsq.quant.presets import PRESETS

# From no visible loss to a large one; none of them needs an importance matrix.
FIT_PRESETS = (
    *("q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_xs"),
    *("q3_k_l", "q3_k_m", "q3_k_s", "q2_k"),
)

FINE_PRESETS = frozenset(FIT_PRESETS[:4])
COARSE_PRESETS = frozenset(FIT_PRESETS[7:])

PROCESS_BYTES = 256 << 20  # Python, libllama and its tables
CARD_OVERHEAD = 512 << 20  # a CUDA context and cuBLAS's workspace
COARSE_KV = "q4_0"
READING_SPEED = 8.0  # tokens per second: slower than one reads code


@dataclass(frozen=True)
class Limits:
    """What may be taken, in bytes, and what it delivers, in bytes per second (None: unknown)."""

    ram: int
    vram: int = 0
    ram_bandwidth: float | None = None
    vram_bandwidth: float | None = None


@dataclass(frozen=True)
class Weights:
    """Bytes of the tensors, by where llama.cpp puts them: layers may go to the card one by one."""

    layers: tuple[int, ...]
    embedding: int
    output: int  # norm and head; with tied embeddings the head is the embedding
    tied: bool
    largest: int  # one tensor

    @property
    def total(self) -> int:
        return sum(self.layers) + self.embedding + self.output

    @property
    def head(self) -> int:
        """What one token reads for its logits."""
        return self.output + (self.embedding if self.tied else 0)


@dataclass(frozen=True)
class Placement:
    """A model in a machine. `n_gpu_layers` is llama.cpp's -ngl: the head counts as one more layer.

    `tokens_per_s` is what memory bandwidth allows at most with an empty cache, `tokens_per_s_full`
    with a full one; None when a bandwidth is not known.
    """

    kv_type: str
    n_ctx: int
    n_layer: int
    n_gpu_layers: int
    ram: int
    vram: int
    kv_cache: int
    compute: int
    tokens_per_s: float | None
    tokens_per_s_full: float | None

    @property
    def on_card(self) -> bool:
        return self.n_gpu_layers > self.n_layer


@dataclass(frozen=True)
class Row:
    """One preset of one model. `placement` is None when it does not fit, and `lacks` says why."""

    preset: str
    weights: int
    file: int
    bpw: float
    placement: Placement | None
    lacks: str = ""

    def to_json(self) -> dict[str, Any]:
        at = self.placement
        return {
            "type": self.preset,
            "bpw": round(self.bpw, 4),
            "weights_bytes": self.weights,
            "file_bytes": self.file,
            "fits": at is not None,
            "lacks": self.lacks or None,
            **(
                {}
                if at is None
                else {
                    "kv_type": at.kv_type,
                    "n_ctx": at.n_ctx,
                    "n_gpu_layers": at.n_gpu_layers,
                    "all_on_gpu": at.on_card,
                    "kv_cache_bytes": at.kv_cache,
                    "compute_bytes": at.compute,
                    "ram_bytes": at.ram,
                    "vram_bytes": at.vram,
                    "tokens_per_s_at_most": _rounded(at.tokens_per_s),
                    "tokens_per_s_at_most_full": _rounded(at.tokens_per_s_full),
                }
            ),
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def weights_of(spec: ModelSpec, sizes: Mapping[str, int]) -> Weights:
    """Sort tensors (GGUF name → bytes) into layers, embedding and head."""
    layers = [0] * spec.n_layer
    embedding = output = 0
    for name, size in sizes.items():
        if name.startswith("blk."):
            layers[int(name.split(".")[1])] += padded(size)
        elif name == "token_embd.weight":
            embedding += padded(size)
        else:
            output += padded(size)
    return Weights(tuple(layers), embedding, output, spec.tied, max(sizes.values(), default=0))


def place(
    spec: ModelSpec, weights: Weights, limits: Limits, n_ctx: int, kv_type: str
) -> Placement | str:
    """As many layers as the card holds, the rest in memory; or what is lacking."""
    least: Placement | None = None
    for n_gpu_layers in range(spec.n_layer + 1 if limits.vram else 0, -1, -1):
        found = _placed(spec, weights, limits, n_ctx, kv_type, n_gpu_layers)
        if found.ram <= limits.ram and found.vram <= limits.vram:
            return found
        if found.vram <= limits.vram and least is None:
            least = found
    assert least is not None, "without layers on it the card holds nothing"
    return f"needs {_gib(least.ram)} of memory, {_gib(limits.ram)} are there"


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"


def _placed(
    spec: ModelSpec, weights: Weights, limits: Limits, n_ctx: int, kv_type: str, n_gpu_layers: int
) -> Placement:
    """The sums for `n_gpu_layers`: the head first, then the last layers (llama-model.cpp)."""
    n_on_card = max(n_gpu_layers - 1, 0)
    kept = spec.n_layer - n_on_card
    kv_layer = memory.kv_bytes_per_layer(spec, n_ctx, kv_type)
    compute = memory.compute_bytes(spec, n_ctx, kv_type)
    card_weights = sum(weights.layers[kept:]) + (weights.head if n_gpu_layers else 0)
    cpu_layers = sum(weights.layers[:kept])
    ram = PROCESS_BYTES + weights.embedding + cpu_layers + kept * kv_layer + compute
    vram = 0
    if n_gpu_layers:
        vram = CARD_OVERHEAD + card_weights + n_on_card * kv_layer + compute
        if kept:
            vram += 2 * weights.largest  # long prompts borrow the card for the layers outside it
    else:
        ram += weights.output
    reads_card = card_weights
    reads_ram = cpu_layers + (0 if n_gpu_layers else weights.head)
    return Placement(
        kv_type=kv_type,
        n_ctx=n_ctx,
        n_layer=spec.n_layer,
        n_gpu_layers=n_gpu_layers,
        ram=ram,
        vram=vram,
        kv_cache=spec.n_layer * kv_layer,
        compute=compute,
        tokens_per_s=_speed(limits, reads_ram, reads_card),
        tokens_per_s_full=_speed(
            limits, reads_ram + kept * kv_layer, reads_card + n_on_card * kv_layer
        ),
    )


def _speed(limits: Limits, from_ram: int, from_card: int) -> float | None:
    """One token reads every weight and the cache once."""
    seconds = 0.0
    for n_bytes, bandwidth in (
        (from_ram, limits.ram_bandwidth),
        (from_card, limits.vram_bandwidth),
    ):
        if n_bytes and bandwidth is None:
            return None
        seconds += n_bytes / (bandwidth or 1.0)
    return 1 / seconds if seconds else None


def best_placement(
    spec: ModelSpec, weights: Weights, limits: Limits, n_ctx: int, kv_types: Sequence[str]
) -> Placement | str:
    """The first cache type with which all is on the card; else the one that lets most layers onto
    it, the finer of two that are equal, and one of 4 bits only where nothing else fits."""
    found = [place(spec, weights, limits, n_ctx, kv_type) for kv_type in kv_types]
    placed = [at for at in found if isinstance(at, Placement)]
    if not placed:
        return str(found[-1])
    whole = next((at for at in placed if at.on_card), None)
    fine = [at for at in placed if at.kv_type != COARSE_KV] or placed
    return whole or max(fine, key=lambda at: at.n_gpu_layers)


def usable_kv_types(spec: ModelSpec) -> tuple[str, ...]:
    """Those that the model's heads divide into."""
    return tuple(k for k in KV_TYPES if k == "f16" or spec.head_dim % 32 == 0)


def plan_presets(
    spec: ModelSpec,
    tensors: Sequence[PlanTensor],
    limits: Limits,
    n_ctx: int,
    *,
    header: int,
    kv_type: str | None = None,
    presets: Sequence[str] = FIT_PRESETS,
) -> list[Row]:
    """One row a preset, finest first; `kv_type` None chooses among f16, q8_0 and q4_0.

    `header` is what stands before the weights in the file. Raises InputError when a head does not
    divide into `kv_type`'s blocks, or n_ctx is more than the model was trained on.
    """
    check_ctx(spec, n_ctx)
    if kv_type is not None:
        memory.kv_type_for(spec, kv_type)
    kv_types = usable_kv_types(spec) if kv_type is None else (kv_type,)
    shape = ModelShape(spec.n_layer, spec.n_head, spec.n_head_kv)
    shapes = {t.name: t.shape for t in tensors}
    n_params = sum(map(prod, shapes.values()))
    rows = []
    for name in presets:
        types = choose_types(tensors, PRESETS[name], shape)
        sizes = {n: prod(s[:-1]) * types[n].row_bytes(s[-1]) for n, s in shapes.items()}
        weights = weights_of(spec, sizes)
        at = best_placement(spec, weights, limits, n_ctx, kv_types)
        rows.append(
            Row(
                preset=name,
                weights=weights.total,
                file=padded(header) + weights.total,
                bpw=8 * sum(sizes.values()) / n_params,
                placement=at if isinstance(at, Placement) else None,
                lacks=at if isinstance(at, str) else "",
            )
        )
    return rows


def row_of_file(
    spec: ModelSpec,
    tensors: Mapping[str, TensorInfo],
    limits: Limits,
    n_ctx: int,
    *,
    name: str,
    header: int,
    kv_type: str | None = None,
) -> Row:
    """The row of a GGUF as it is, called `name`."""
    check_ctx(spec, n_ctx)
    kv_types = usable_kv_types(spec) if kv_type is None else (kv_type,)
    weights = weights_of(spec, {n: t.n_bytes for n, t in tensors.items()})
    n_params = sum(t.n_elements for t in tensors.values())
    at = best_placement(spec, weights, limits, n_ctx, kv_types)
    return Row(
        preset=name,
        weights=weights.total,
        file=padded(header) + weights.total,
        bpw=8 * sum(t.n_bytes for t in tensors.values()) / n_params,
        placement=at if isinstance(at, Placement) else None,
        lacks=at if isinstance(at, str) else "",
    )


def plan_file(
    spec: ModelSpec,
    sizes: Mapping[str, int],
    limits: Limits,
    n_ctx: int,
    kv_type: str | None = None,
) -> Placement:
    """Where a file's tensors (GGUF name → bytes) go. Raises InputError when they do not fit."""
    check_ctx(spec, n_ctx)
    kv_types = usable_kv_types(spec) if kv_type is None else (kv_type,)
    at = best_placement(spec, weights_of(spec, sizes), limits, n_ctx, kv_types)
    if isinstance(at, str):
        raise InputError(
            f"the model {at}; use a smaller context (-c), a quantized cache (--kv-type q8_0) or a "
            f"smaller quantization (dsq fit shows them)"
        )
    return at


def check_ctx(spec: ModelSpec, n_ctx: int) -> None:
    if n_ctx > spec.n_ctx:
        raise InputError(
            f"--ctx {n_ctx}: the model was trained on {spec.n_ctx} tokens; give at most that"
        )


def recommend(rows: Sequence[Row], limits: Limits) -> tuple[Row | None, str]:
    """The row to take, and why in one sentence; None when nothing fits.

    The finest that is wholly on the card; without one, or where the card is too small for any, the
    finest that is faster than one reads; if none is, q4_k_m or the next that fits: what is coarser
    is not much faster.
    """
    placed = [(row, row.placement) for row in rows if row.placement is not None]
    if not placed:
        return None, rows[-1].lacks if rows else "no presets"
    whole = [(row, at) for row, at in placed if at.on_card]
    if whole:
        # A 4-bit cache costs more than a step from one preset to the next, down to 4 bits.
        fine = [
            row for row, at in whole if at.kv_type != COARSE_KV and row.preset not in COARSE_PRESETS
        ]
        row = fine[0] if fine else whole[0][0]
        return row, "the finest that is wholly on the card" + _cache(row)
    on_card = any(at.n_gpu_layers for _, at in placed)
    where = "with a part on the card" if on_card else "in memory"
    usual = next((row for row, _ in placed if row.preset not in FINE_PRESETS), placed[-1][0])
    if any(at.tokens_per_s_full is None for _, at in placed):
        why = f"the usual choice {where}{_cache(usual)}; its speed is not known"
        return usual, f"{why}: give --card or --bandwidth"
    readable = [row for row, at in placed if (at.tokens_per_s_full or 0) >= READING_SPEED]
    if readable:
        why = f"the finest {where}{_cache(readable[0])} that gives {READING_SPEED:g} tokens/s"
        return readable[0], f"{why} when the context is full"
    why = f"the usual choice {where}{_cache(usual)}; no type gives {READING_SPEED:g} tokens/s"
    return usual, f"{why} when the context is full"


def _cache(row: Row) -> str:
    at = row.placement
    assert at is not None, "a row that was chosen is placed"
    return "" if at.kv_type == "f16" else f" with a {at.kv_type} cache"
