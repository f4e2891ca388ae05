"""`dsq tokenizer check`: Hugging Face's tokens against llama.cpp's."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsq.cli import common

if TYPE_CHECKING:
    from dsq.runtime.tokenizer_check import Finding, Report, Tokens

DESCRIPTION = (
    "check: encode texts with Hugging Face's tokenizers library, with dsq and with\n"
    "llama.cpp itself, and compare. MODEL is a directory with a tokenizer.json, of\n"
    "which dsq writes a GGUF without weights, or a GGUF. The texts: a built-in\n"
    "corpus, files, random Unicode. The first mismatch is shown in its smallest\n"
    "form, with the code points to blame. Exit code 1 on any mismatch.\n"
    "docs/tokenizer.md lists where llama.cpp itself differs."
)
EXAMPLE = "dsq tokenizer check ./deepseek-coder-1.3b-base --fuzz 2000"

_MOST_FUZZ = 10_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # Behind a word of its own, so that MODEL may be left out and may follow an option.
    actions = parser.add_subparsers(dest="action", required=True, metavar="check")
    check = actions.add_parser(
        "check",
        help="its options: dsq tokenizer check --help",
        description=parser.description,
        epilog=parser.epilog,
        formatter_class=parser.formatter_class,
    )
    common.add_source(check, "model", ".gguf, directory or hub id")
    check.add_argument(
        "--against", metavar="GGUF", type=Path, help="let llama.cpp read this file's vocabulary"
    )
    check.add_argument(
        "--text",
        metavar="FILE",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        help="UTF-8 text to compare",
    )
    check.add_argument(
        "--fuzz",
        metavar="N",
        type=_count,
        default=0,
        help="random texts, weighted to where regex engines and Unicode tables disagree",
    )
    check.add_argument("--seed", metavar="S", type=int, default=0, help="of the random texts")
    check.add_argument(
        "--pre", metavar="NAME", help="llama.cpp's name of the pre-tokenizer, where none is known"
    )
    common.add_hub(check)
    common.add_json(check)


def _take_model(args: argparse.Namespace) -> None:
    """`--text a.txt MODEL`: the option takes all it can get, the model as well."""
    if args.model is None and args.text:
        last = args.text[-1]
        if last.suffix == ".gguf" or last.is_dir():
            args.model = str(args.text.pop())


def _count(text: str) -> int:
    return 0 if text == "0" else common.positive(text, _MOST_FUZZ)


def run(args: argparse.Namespace) -> int:
    from dsq.runtime.tokenizer_check import check

    _take_model(args)
    model = common.local_model(args.model, args)
    report = check(
        model,
        against=args.against,
        files=args.text,
        fuzz=args.fuzz,
        seed=args.seed,
        pre=args.pre,
    )
    if args.json:
        common.print_json(_json(report, args))
    else:
        _print(report)
    return 0 if report.ok else 1


def _json(report: Report, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": str(report.model),
        "against": None if report.against is None else str(report.against),
        "rebuilt_by": report.rebuilt,
        "fuzz": args.fuzz,
        "seed": args.seed,
        "texts": report.texts,
        "tokens": report.tokens,
        "seconds": round(report.seconds, 3),
        "tokens_per_second": round(_rate(report)),
        "mismatches": report.mismatches,
        "dsq_mismatches": report.own_mismatches,
        "first": _finding_json(report.first, "llama_cpp"),
        "first_dsq": _finding_json(report.first_own, "dsq"),
        "explained": report.explained,
        "blame": [{**point.to_json(), "texts": n} for point, n in report.blamed],
        "notes": list(report.notes),
    }


def _finding_json(finding: Finding | None, other: str) -> dict[str, Any] | None:
    if finding is None:
        return None

    def side(tokens: Tokens) -> dict[str, Any]:
        return {"ids": [i for i, _ in tokens], "pieces": [piece for _, piece in tokens]}

    return {
        "where": finding.where,
        "length": finding.length,
        "text": finding.text,
        "hf": side(finding.hf),
        other: side(finding.other),
        "blame": [point.to_json() for point in finding.blame],
    }


def _rate(report: Report) -> float:
    return report.tokens / max(report.seconds, 1e-9)


def _print(report: Report) -> None:
    print(f"{report.texts:,} texts, {report.tokens:,} tokens, {_rate(report):,.0f} tokens/s")
    if report.rebuilt is not None:
        print(f"no tokenizer.json inside: rebuilt by the rules of {report.rebuilt!r}")
    for note in report.notes:
        print(note)
    print(f"mismatches: {report.mismatches} between HF and llama.cpp", end="")
    print(f", {report.own_mismatches} between HF and dsq")
    for name, finding in (("llama.cpp", report.first), ("dsq", report.first_own)):
        if finding is not None:
            _print_finding(finding, name)
    if len(report.blamed) > 1 or report.explained > 1:
        print(f"to blame in the first {report.explained}:")
        for point, n in report.blamed:
            print(f"  {point}: {n}")


def _print_finding(finding: Finding, name: str) -> None:
    print(f"first, of {finding.length} characters ({finding.where}), shrunk to {finding.text!a}")
    for side, tokens in (("HF", finding.hf), (name, finding.other)):
        print(f"  {side:<10} " + "  ".join(f"{i} {piece!a}" for i, piece in tokens))
    print("  to blame   " + ", ".join(map(str, finding.blame)))
