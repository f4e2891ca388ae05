"""`dsq imatrix`: llama.cpp's importance matrices from statistics, merged, shown."""

from __future__ import annotations

import argparse
from pathlib import Path

from dsq.cli import common
from dsq.errors import InputError

DESCRIPTION = (
    "make STATS: write an importance matrix as llama-imatrix would (GGUF) from the statistics of\n"
    "dsq calibrate. merge A B …: one matrix as if of one text; each may be an imatrix GGUF or\n"
    "statistics. show FILE: what is in one."
)
EXAMPLE = "dsq imatrix make stats.safetensors -o imatrix.gguf"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("make", "merge", "show"))
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("-o", "--output", type=Path, help="default: imatrix.gguf")
    parser.add_argument(
        "--process-output", action="store_true", help="make: with output.weight (not by default)"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from dsq.convert.imatrix import read_sums, sums_of_stats
    from dsq.convert.imatrix_writer import merge, summary, write_imatrix
    from dsq.quant.stats import read_stats

    if args.action != "merge" and len(args.files) > 1:
        raise InputError(f"dsq imatrix {args.action} takes one file, not {len(args.files)}")
    if args.process_output and args.action != "make":
        raise InputError("--process-output is for dsq imatrix make")
    if args.output and args.action == "show":
        raise InputError("-o is for dsq imatrix make and merge; show prints")
    if args.action == "make":
        found = sums_of_stats(read_stats(args.files[0]), output=args.process_output)
    else:
        found = merge([read_sums(path) for path in args.files])
    rows = summary(found)
    if args.action != "show":
        out = args.output or Path("imatrix.gguf")
        write_imatrix(out, found, force=args.force)
    if args.json:
        about = {
            "output": str(out) if args.action != "show" else None,
            "datasets": list(found.datasets),
            "chunk_count": found.n_chunks,
            "chunk_size": found.chunk_size,
            "tensors": rows,
        }
        common.print_json(about)
    elif args.action == "show":
        datasets = ", ".join(found.datasets) or "no dataset named"
        print(f"{datasets}; {found.n_chunks} chunks of {found.chunk_size} tokens")
        print(f"{'tensor':<28} {'channels':>8} {'tokens':>9} {'total':>12} {'largest':>8}")
        for row in rows:
            print(
                f"{row['tensor']:<28} {row['n_channels']:>8} {row['count']:>9} "
                f"{row['total']:>12.5g} {row['largest_share']:>7.1%}"
            )
    else:
        print(f"{out}: {len(rows)} tensors, {found.n_chunks} chunks of {found.chunk_size} tokens")
    return 0
