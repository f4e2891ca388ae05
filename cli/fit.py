"""`dsq fit`: which quantization fits this machine, and how fast it can be."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsq.cli import common
from dsq.errors import InputError

if TYPE_CHECKING:
    from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
    from dsq.convert.spec import ModelSpec
    from dsq.runtime.fit import Limits, Row

DESCRIPTION = (
    "Show what each quantization of MODEL needs: file, memory, layers on the card, KV cache, and\n"
    "the tokens per second that memory bandwidth allows at most; and recommend one. MODEL may be\n"
    "a .gguf, a directory, a hub id, or a DeepSeek Coder size (deepseek-coder-6.7b), which is not\n"
    "downloaded. Without MODEL: the four sizes. A pure plan: nothing is loaded."
)
EXAMPLE = "dsq fit deepseek-coder-6.7b --vram 8GiB --ctx 16384"
_DEFAULT_CTX = 16384
_MOST_BYTES = 64 << 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="default: the four sizes")
    parser.add_argument(
        "--vram", type=_vram, metavar="8GiB", help="the card's; 0 for none (default: what is free)"
    )
    parser.add_argument("--ram", type=_size, metavar="16GiB", help="default: what is free")
    parser.add_argument(
        "-c", "--ctx", "--ctx-size", type=common.positive, metavar="N", help="default: 16384"
    )
    parser.add_argument(
        "--kv-type",
        choices=("f16", "q8_0", "q4_0"),
        help="default: the finest with which all fits the card",
    )
    parser.add_argument("--card", metavar="NAME", help="rtx-4090, …: its memory and bandwidth")
    parser.add_argument(
        "--bandwidth",
        type=_bandwidth,
        metavar="GB/s",
        help="the card's, or the memory's without a card (default: measured)",
    )
    parser.add_argument("--ram-bandwidth", type=_bandwidth, metavar="GB/s", help="beside a card's")
    common.add_hub(parser)
    common.add_json(parser)


def _vram(text: str) -> int:
    """argparse type: a size, or 0 for no card."""
    return 0 if re.fullmatch(r"0+([.]0*)?\s*([KMGT]?i?B?)", text.strip(), re.I) else _size(text)


def _size(text: str) -> int:
    """argparse type: a size that a machine can have."""
    n_bytes = common.size(text)
    if n_bytes > _MOST_BYTES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is more than {_MOST_BYTES >> 40} TiB; write what the machine has, as 16GiB"
        )
    return n_bytes


def _bandwidth(text: str) -> float:
    """argparse type: `504`, `504GB/s`; 10⁹ bytes per second."""
    try:
        value = float(text.lower().removesuffix("/s").removesuffix("gb"))
    except ValueError:
        value = 0.0
    if not (math.isfinite(value) and 0 < value < 1e6):
        raise argparse.ArgumentTypeError(f"{text!r} is no bandwidth; write 504 or 504GB/s")
    return value * 1e9


@dataclass(frozen=True)
class _Plan:
    model: str
    n_ctx: int
    rows: list[Row]
    chosen: Row | None
    why: str

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "n_ctx": self.n_ctx,
            "rows": [row.to_json() for row in self.rows],
            "recommended": self.chosen.preset if self.chosen else None,
            "why": self.why,
        }


def run(args: argparse.Namespace) -> int:
    from dsq.convert.model_shapes import SHAPES

    limits, note = _limits(args)
    plans = [_plan(name, args, limits) for name in ([args.model] if args.model else SHAPES)]
    if args.json:
        common.print_json(
            {
                "limits": {
                    "ram_bytes": limits.ram,
                    "vram_bytes": limits.vram,
                    "ram_bandwidth": limits.ram_bandwidth,
                    "vram_bandwidth": limits.vram_bandwidth,
                },
                "models": [plan.to_json() for plan in plans],
            }
        )
    else:
        _print(plans, limits, note)
    return 0


def _limits(args: argparse.Namespace) -> tuple[Limits, str]:
    """What is asked for, else what is free on this machine; and what to know of a measurement."""
    from dsq.quant.threads import default_threads, free_cores
    from dsq.runtime import bandwidth, devices
    from dsq.runtime.fit import Limits

    card = bandwidth.card(args.card) if args.card else None
    vram, on_card = args.vram, args.bandwidth
    if vram is None and card is not None:
        vram = card.vram
    if vram is None:
        seen = devices.cards()
        vram = seen[0].vram_free if seen else 0
    if not vram and args.ram_bandwidth and args.bandwidth:
        raise InputError("--ram-bandwidth: --bandwidth is the memory's without a card; give one")
    if on_card is None and card is not None:
        on_card = card.bandwidth
    in_ram = args.ram_bandwidth or (None if vram else args.bandwidth)
    busy = in_ram is None and free_cores() < default_threads()
    limits = Limits(
        ram=devices.available_memory() if args.ram is None else args.ram,
        vram=vram,
        ram_bandwidth=in_ram or bandwidth.memory_bandwidth(),
        vram_bandwidth=on_card if vram else None,
    )
    return limits, " (measured on a busy machine: idle it is faster)" if busy else ""


def _plan(name: str, args: argparse.Namespace, limits: Limits) -> _Plan:
    from pathlib import Path

    from dsq.convert.model_shapes import SHAPES, header_bytes, known_shape, plan_tensors
    from dsq.runtime.fit import plan_presets, recommend

    known = None if Path(name).exists() else known_shape(name)
    if known is not None:
        title, spec = known
        n_ctx = args.ctx or min(spec.n_ctx, _DEFAULT_CTX)
        rows = plan_presets(
            spec,
            plan_tensors(spec),
            limits,
            n_ctx,
            header=header_bytes(spec),
            kv_type=args.kv_type,
        )
        return _Plan(title, n_ctx, rows, *recommend(rows, limits))
    from dsq.convert.inspect import open_model

    if "/" not in name and not name.endswith(".gguf") and not Path(name).exists():
        raise InputError(
            f"{name}: neither a file or folder here nor one of the sizes that dsq knows "
            f"({', '.join(SHAPES)})"
        )
    checkpoint = open_model(common.local_model(name, args))
    n_ctx = args.ctx or min(checkpoint.spec.n_ctx, _DEFAULT_CTX)
    rows = _rows_of(checkpoint, args, limits, n_ctx)
    return _Plan(str(checkpoint.path), n_ctx, rows, *recommend(rows, limits))


def _rows_of(
    checkpoint: HfCheckpoint | GgufCheckpoint, args: argparse.Namespace, limits: Limits, n_ctx: int
) -> list[Row]:
    """The presets of an unquantized model; of a quantized file, the file itself."""
    from dsq.convert.gguf.writer import padded
    from dsq.convert.names import gguf_name
    from dsq.convert.pipeline import file_preset
    from dsq.quant.plan import PlanTensor
    from dsq.quant.scheme import F32
    from dsq.runtime.fit import plan_presets, row_of_file

    spec: ModelSpec = checkpoint.spec
    if checkpoint.format == "gguf":
        tensors = checkpoint.tensors
        size = sum(path.stat().st_size for path in {t.path for t in tensors.values()})
        header = size - sum(padded(t.n_bytes) for t in tensors.values())
        if any(t.type.is_quantized for t in tensors.values()):
            made = file_preset(checkpoint)
            return [
                row_of_file(
                    spec,
                    tensors,
                    limits,
                    n_ctx,
                    name=made.name if made else "as it is",
                    header=header,
                    kv_type=args.kv_type,
                )
            ]
        planned = [PlanTensor(n, t.shape, t.type) for n, t in tensors.items()]
    else:
        from dsq.cli.best import header_bytes

        header = header_bytes(checkpoint)
        planned = [
            PlanTensor(gguf_name(n), t.shape, t.type if len(t.shape) > 1 else F32)
            for n, t in checkpoint.tensors.items()
        ]
    return plan_presets(spec, planned, limits, n_ctx, header=header, kv_type=args.kv_type)


def _print(plans: Sequence[_Plan], limits: Limits, note: str) -> None:
    """One model: all rows. Several: the recommended row of each."""
    from rich.console import Console
    from rich.table import Table

    several = len(plans) > 1
    shown = [
        (plan, row)
        for plan in plans
        for row in ([plan.chosen or plan.rows[-1]] if several else plan.rows)
    ]
    known = any(row.placement and row.placement.tokens_per_s for _, row in shown)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in (*(("model",) if several else ()), "type"):
        table.add_column(head, no_wrap=True)
    on_card = ("on card", "layers") if limits.vram else ()
    heads = ("file", "KV type", "KV cache", *on_card, "in memory")
    for head in (*heads, *(("tokens/s",) if known else ())):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("")
    for plan, row in shown:
        mark = row.lacks.partition(",")[0]  # what is there stands above the table
        if row is plan.chosen and not several:
            mark = "← recommended"
        cells = _cells(row, card=bool(limits.vram), speed=known)
        table.add_row(*((plan.model,) if several else ()), *cells, mark)
    console = Console(highlight=False, width=None if Console().is_terminal else 120)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    card = f", card {common.human(limits.vram)}" if limits.vram else ", no card"
    about = f"memory {common.human(limits.ram)}{_rate(limits.ram_bandwidth)}{note}{card}"
    if limits.vram:
        about += _rate(limits.vram_bandwidth)
    name = "" if several else f"{plans[0].model}: "
    say(f"{name}context {plans[0].n_ctx:,}; {about}")
    console.print(table)
    for plan in plans:
        start = f"{plan.model}: " if several else ""
        found = plan.chosen.preset if plan.chosen else "nothing fits"
        say(f"{start}{found}: {plan.why}")
    if known:
        say("tokens/s: what bandwidth allows at most, with an empty → with a full cache")
    else:
        say("tokens/s: not known without the card's bandwidth; give --card NAME or --bandwidth")


def _rate(bandwidth: float | None) -> str:
    return "" if bandwidth is None else f" at {bandwidth / 1e9:,.0f} GB/s"


def _cells(row: Row, *, card: bool, speed: bool) -> list[str]:
    at = row.placement
    file = common.human(row.file)
    if at is None:
        return [row.preset, file, *(["–"] * (3 + 2 * card + speed))]
    layers = "all" if at.on_card else f"{at.n_gpu_layers} of {at.n_layer + 1}"
    return [
        row.preset,
        file,
        at.kv_type,
        common.human(at.kv_cache),
        *([common.human(at.vram) if at.vram else "–", layers] if card else []),
        common.human(at.ram),
        *([f"{_speed(at.tokens_per_s)} → {_speed(at.tokens_per_s_full)}"] if speed else []),
    ]


def _speed(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f}" if value < 10 else f"{value:.0f}"
