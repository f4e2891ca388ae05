"""`dsq devices`: what each engine sees on this machine."""

from __future__ import annotations

import argparse
from typing import Any

from dsq.cli import common

DESCRIPTION = (
    "Show which engines are installed and what each sees: processor features, GPU offload,\n"
    "CUDA; and the command that installs what is missing."
)
EXAMPLE = "dsq devices --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from dsq.runtime.devices import report

    found = report()
    if args.json:
        common.print_json(found)
    else:
        _print(found)
    return 0


def _print(found: dict[str, Any]) -> None:
    cpu = found["cpu"]
    print(
        f"{'processor':<12} {cpu['physical_cores']} cores, {cpu['threads']} of them free; "
        f"{common.human(cpu['memory_available_bytes'])} of memory free"
    )
    for card in found["cards"]:
        print(
            f"{'card':<12} {card['name']}, {common.human(card['vram'])}, "
            f"{common.human(card['vram_free'])} free"
        )
    if not found["cards"]:
        print(f"{'card':<12} none that nvidia-smi knows")
    for engine in found["engines"]:
        title = f"{engine['version']}, {engine['sees']}" if engine["installed"] else engine["sees"]
        print(f"{engine['name']:<12} {title} ({engine['runs']})")
        if engine["install"]:
            what = "with a GPU: " if engine["sees"].startswith("CPU only") else ""
            print(f"{'':<12} {what}{engine['install']}")
