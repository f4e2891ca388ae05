"""`dsq verify`: is the artifact the source? With a receipt."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dsq.cli import common
from dsq.errors import InputError

if TYPE_CHECKING:
    from dsq.runtime.verification.receipt import Verification

DESCRIPTION = (
    "Prove that ARTIFACT is its source: every tensor within what its type explains, RoPE, token\n"
    "ids, tokenizer, template, and logits in llama.cpp at short positions and beyond 4,096.\n"
    "Writes a receipt with all figures and hashes. Exit code 1 when a check fails."
)
EXAMPLE = "dsq verify coder-q4_k_m.gguf --source ./deepseek-coder-1.3b-base"

_MARK = {True: "✓", False: "✗", None: "–"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", metavar="ARTIFACT", type=Path, help=".gguf or directory")
    parser.add_argument(
        "--source", required=True, metavar="SRC", help="directory, .gguf or hub id it was made from"
    )
    parser.add_argument(
        "--receipt", type=Path, metavar="PATH", help="default: ARTIFACT.receipt.json"
    )
    parser.add_argument("--no-logits", action="store_true", help="compare files only: faster")
    common.add_threads(parser)
    common.add_hub(parser)
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from dsq.runtime.verification.receipt import receipt_path, write_receipt
    from dsq.runtime.verification.verify import verify

    source = common.local_model(args.source, args)
    receipt = args.receipt or receipt_path(args.artifact)
    check_receipt(receipt)
    result = verify(
        args.artifact,
        source,
        logits=not args.no_logits,
        threads=args.threads,
        progress=_progress(args),
    )
    write_receipt(result, receipt)
    if args.json:
        common.print_json({**result.to_json(), "receipt": str(receipt)})
    else:
        _print(result, receipt)
    return 0 if result.ok else 1


def check_receipt(path: Path) -> None:
    """Refuse a place where no receipt can be written, before the work is done."""
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: no receipt can be written there; give --receipt PATH")
    if path.exists() and not _is_receipt(path):
        raise InputError(
            f"{path} exists and is no receipt; it is not replaced: give --receipt PATH"
        )


def _is_receipt(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"dsq", "checks", "artifact"} <= set(content)


def _progress(args: argparse.Namespace) -> Callable[[str], None]:
    """Which check is being made, on a terminal; each line overwrites the last."""
    if args.json or not sys.stderr.isatty():
        return lambda name: None

    def show(name: str) -> None:
        print(f"\r\x1b[K{name} …", end="", file=sys.stderr, flush=True)

    return show


def _print(result: Verification, receipt: Path) -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    width = max(len(check.name) for check in result.checks)
    for check in result.checks:
        print(f"{_MARK[check.ok]} {check.name:<{width}}  {check.detail}")
    verdict = "is its source" if result.ok else "is NOT its source"
    print(f"{result.artifact.path} {verdict} ({result.source.path}); receipt: {receipt}")
