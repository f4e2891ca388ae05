"""`python -m benchmarks.run [NAME…]`: measure, and write benchmarks/RESULTS.md."""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.measure import CpuTimes, load
from benchmarks.peers import ROOT, find_peers
from benchmarks.results import RESULTS, conditions, write
from benchmarks.settings import Settings, say
from dsq.quant.threads import default_threads

MODULES = {
    "convert": "benchmarks.convert",
    "memory": "benchmarks.memory",
    "startup": "benchmarks.startup",
    "eval": "benchmarks.evaluation",
    "calibration": "benchmarks.calibration",
    "compensated": "benchmarks.compensated",
    "distillation": "benchmarks.distillation",
    "tokenizer": "benchmarks.tokenizer",
    "gptq": "benchmarks.gptq",
    "exl2": "benchmarks.exl2",
    "packing": "benchmarks.packing",
    "repack": "benchmarks.repack",
    "server": "benchmarks.server_speed",
}
BUSY = 0.05


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="dsq against llama.cpp's own tools, written to benchmarks/RESULTS.md. "
        "Nothing else may run meanwhile. Linux only.",
    )
    p.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(MODULES)} (default: all)")
    p.add_argument("--quick", action="store_true", help="small models; print, write nothing")
    p.add_argument("--text", type=Path, default=ROOT / "models" / "tiny-coder" / "heldout.txt")
    p.add_argument("--chunks", type=int, default=24, help="windows of 512 tokens for eval")
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument(
        "--work",
        type=Path,
        default=ROOT / ".cache",
        help="where models are made: 9 GB for convert, 22 GB for memory",
    )
    p.add_argument("--keep", action="store_true", help="leave the models there for the next run")
    return p


def main() -> int:
    args = parser().parse_args()
    unknown = set(args.names) - set(MODULES)
    if unknown:
        parser().error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(MODULES)}")
    settings = Settings(
        work=args.work.resolve() / "dsq-bench",  # a folder of its own: it is removed at the end
        repeat=1 if args.quick else args.repeat,
        quick=args.quick,
        text=args.text.resolve(),
        chunks=2 if args.quick else args.chunks,
        threads=default_threads(),
    )
    settings.work.mkdir(parents=True, exist_ok=True)
    find_peers()
    try:
        for name in args.names or MODULES:
            _one(name, settings)
    finally:
        if not args.keep:
            shutil.rmtree(settings.work)
    return 0


def _one(name: str, settings: Settings) -> None:
    busy = load()
    if busy > BUSY:
        say(f"The machine is {100 * busy:.0f} % busy with something else: no time to measure.")
    before, start = CpuTimes.now(), time.perf_counter()
    section = importlib.import_module(MODULES[name]).benchmark(settings)
    about = conditions(settings.peers, settings.repeat, before, busy)
    section = replace(section, body=f"{about}\n\n{section.body}")
    if settings.quick:
        print(f"## {section.title}\n\n{section.body}\n", flush=True)
    else:
        write(section)
        say(
            f"{name}: {RESULTS.relative_to(ROOT)} updated after {time.perf_counter() - start:.0f} s"
        )


if __name__ == "__main__":
    sys.exit(main())
