"""`dsq doctor`: what old or careless conversions got wrong in a GGUF, and the mend."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsq.cli import common
from dsq.cli.progress import progress_bar

if TYPE_CHECKING:
    from dsq.convert.doctor import Diagnosis, Finding

DESCRIPTION = (
    "Find what old or careless conversions got wrong in a GGUF: pre-tokenizer, RoPE, special ids,\n"
    "token types, chat template. Reads the header only. --fix writes a mended copy with the same\n"
    "tensor bytes; FILE itself is never changed. Where the model's family is not recognised,\n"
    "nothing is changed that depends on it.\n"
    "Exit code 1 when something is wrong (with --fix: when something is left), 0 when all is well."
)
EXAMPLE = "dsq doctor coder-2023.Q4_K_M.gguf --fix coder.Q4_K_M.gguf"

_RED, _YELLOW, _GREEN = 31, 33, 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help=".gguf, or a split one's first")
    parser.add_argument("--fix", type=Path, metavar="OUT", help="write the mended file here")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--pre", metavar="NAME", help="the pre-tokenizer, where you know better")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from dsq.convert.doctor import diagnose, mended_entries
    from dsq.convert.gguf.reader import read_gguf
    from dsq.convert.gguf.rewrite import data_bytes, rewrite_gguf

    gguf = read_gguf(args.file)
    diagnosis = diagnose(gguf.metadata, gguf.tensors, pre=args.pre)
    left, written = diagnosis.findings, []
    if args.fix is not None and diagnosis.mendable:
        entries = mended_entries(gguf.metadata, gguf.metadata_types, diagnosis.findings)
        mended = {entry.key: entry.value for entry in entries}
        left = diagnose(mended, gguf.tensors, pre=args.pre).findings
        with progress_bar(f"→ {args.fix}", data_bytes(gguf), quiet=args.json) as advance:
            written = rewrite_gguf(gguf, entries, args.fix, force=args.force, on_bytes=advance)
    if args.json:
        common.print_json(
            {
                "path": str(args.file),
                "family": diagnosis.family,
                "evidence": diagnosis.evidence,
                "findings": [finding.to_json() for finding in diagnosis.findings],
                "written": [str(path) for path in written],
                "left": [finding.code for finding in left],
            }
        )
    else:
        _print(args, diagnosis, written, left)
    return 1 if left else 0


def _print(
    args: argparse.Namespace,
    diagnosis: Diagnosis,
    written: list[Path],
    left: tuple[Finding, ...],
) -> None:
    for finding in diagnosis.findings:
        mark = _colored("✗", _RED) if finding.serious else _colored("!", _YELLOW)
        likely = "" if finding.sure else " (likely, not sure)"
        print(f"{mark} {finding.code}: {_shown(finding.wrong)}{likely}")
        print(f"  does: {_shown(finding.effect)}")
        print(f"  mend: {_shown(finding.mend)}\n")
    family = diagnosis.family or "family not recognised"
    print(f"{args.file}: {family}: {_shown(diagnosis.evidence)}")
    n, serious = len(diagnosis.findings), len(diagnosis.serious)
    if not n:
        unwritten = f"; {args.fix} not written" if args.fix else ""
        print(f"{_colored('✓', _GREEN)} nothing wrong found{unwritten}")
        return
    counted = f"{n} fault{'' if n == 1 else 's'}, {serious} of which change{_s(serious)} its output"
    if written:
        more = f" and {len(written) - 1} more" if len(written) > 1 else ""
        print(f"{counted}; mended: {written[0]}{more}")
    elif diagnosis.mendable:
        print(f"{counted}; write a mended copy with dsq doctor {args.file} --fix OUT")
    else:
        print(f"{counted}; none can be mended here{', nothing written' if args.fix else ''}")
    if written and left:
        print(f"not mended: {', '.join(finding.code for finding in left)}")


def _s(n: int) -> str:
    return "s" if n == 1 else ""


def _shown(text: Any) -> str:
    """Names and templates come from the file: nothing in them may steer the terminal."""
    return "".join(char if char.isprintable() else "\ufffd" for char in str(text))


def _colored(mark: str, color: int) -> str:
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return mark
    return f"\x1b[{color}m{mark}\x1b[0m"
