"""`dsq doctor`: what old or careless conversions got wrong in a GGUF, and the mend."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsq.cli import common
from dsq.cli.progress import progress_bar
from dsq.errors import InputError

if TYPE_CHECKING:
    from dsq.convert.doctor import Diagnosis, Finding

DESCRIPTION = (
    "Find what old or careless conversions got wrong in a GGUF: pre-tokenizer, RoPE,\n"
    "special ids, token types, chat template. Reads the header only. --fix writes a\n"
    "mended copy with the same tensor bytes; FILE itself is never changed. Where the\n"
    "model's family is not recognised, what depends on it is neither examined nor\n"
    "changed, and that is said.\n"
    "Exit code 1 when something is wrong (with --fix: when something is left), 0\n"
    "when nothing wrong was found."
)
EXAMPLE = "dsq doctor coder-2023.Q4_K_M.gguf --fix coder.Q4_K_M.gguf"

_RED, _YELLOW, _GREEN = 31, 33, 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        metavar="FILE",
        type=Path,
        nargs="?",
        help=".gguf, or a split one's first (default: the one in this folder)",
    )
    parser.add_argument("--fix", type=Path, metavar="OUT", help="write the mended file here")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--pre", metavar="NAME", help="the pre-tokenizer, where you know better")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from dsq.convert.doctor import diagnose, mended_entries
    from dsq.convert.gguf.reader import read_gguf
    from dsq.convert.gguf.rewrite import data_bytes, rewrite_gguf

    args.file = _file(args.file)
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
                "examined": list(diagnosis.examined),
                "not_examined": list(diagnosis.not_examined),
                "findings": [finding.to_json() for finding in diagnosis.findings],
                "written": [str(path) for path in written],
                "left": [finding.code for finding in left],
            }
        )
    else:
        _print(args, diagnosis, written, left)
    return 1 if left else 0


def _file(given: Path | None) -> Path:
    """FILE, or the one GGUF in this folder."""
    folder = given or Path()
    if given is not None and not given.is_dir():
        return given
    later = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
    found = [p for p in sorted(folder.glob("*.gguf")) if not later.search(p.name)]
    if given is None and len(found) == 1:
        return found[0]
    what = "this folder" if given is None else f"{given}: is a directory; it"
    if not found:
        raise InputError(f"{what} has no .gguf; give one")
    more = f" and {len(found) - 6} more" if len(found) > 6 else ""
    raise InputError(f"{what} has {', '.join(p.name for p in found[:6])}{more}; give one of them")


def _print(
    args: argparse.Namespace,
    diagnosis: Diagnosis,
    written: list[Path],
    left: tuple[Finding, ...],
) -> None:
    for finding in diagnosis.findings:
        mark = _colored("✗", _RED) if finding.serious else _colored("!", _YELLOW)
        likely = "" if finding.sure else " (likely, not sure)"
        _say(f"{finding.code}: {finding.wrong}{likely}", mark)
        _say(f"does: {finding.effect}", " ")
        _say(f"mend: {finding.mend}", " ")
        print()
    _say(f"{args.file}: {diagnosis.family or 'family not recognised'}: {diagnosis.evidence}")
    _say(f"examined: {', '.join(diagnosis.examined)}")
    for area in diagnosis.not_examined:
        _say(f"not examined: {area}")
    n, serious = len(diagnosis.findings), len(diagnosis.serious)
    if not n:
        mark = _colored("✓", _GREEN) if diagnosis.family else _colored("!", _YELLOW)
        where = " in what was examined" if diagnosis.not_examined else ""
        _say(f"nothing wrong found{where}{f'; {args.fix} not written' if args.fix else ''}", mark)
        return
    counted = f"{n} fault{'' if n == 1 else 's'}, {serious} of which change{_s(serious)} its output"
    needs_pre = args.pre is None and any(f.code == "pre" and not f.mendable for f in left)
    if written:
        more = f" and {len(written) - 1} more" if len(written) > 1 else ""
        _say(f"{counted}; mended: {written[0]}{more}")
    elif diagnosis.mendable or needs_pre:
        _say(f"{counted}{'; nothing written' if args.fix else ''}")
    else:
        _say(f"{counted}; none can be mended here{', nothing written' if args.fix else ''}")
    if written and left:
        _say(f"not mended: {', '.join(finding.code for finding in left)}")
    if needs_pre or (diagnosis.mendable and not written):
        # On a line of its own and never wrapped: it is to be copied.
        again = f"dsq doctor {shlex.quote(str(args.file))} --fix OUT"
        print(_shown(f"write a mended copy with: {again}{' --pre NAME' if needs_pre else ''}"))


def _say(text: str, mark: str = "") -> None:
    """One paragraph, behind its mark; on a terminal as wide as that."""
    text, indent = _shown(text), 2 if mark else 0
    lines = [text]
    if sys.stdout.isatty():
        width = max(20, shutil.get_terminal_size().columns - 1 - indent)
        lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    lead = f"{mark} " if mark else ""
    print(lead + ("\n" + " " * indent).join(lines))


def _s(n: int) -> str:
    return "s" if n == 1 else ""


def _shown(text: Any) -> str:
    """Names and templates come from the file: nothing in them may steer the terminal."""
    return "".join(char if char.isprintable() else "\ufffd" for char in str(text))


def _colored(mark: str, color: int) -> str:
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return mark
    return f"\x1b[{color}m{mark}\x1b[0m"
