"""`dsq calibrate`: statistics of what a model's matrices see in calibration text."""

from __future__ import annotations

import argparse
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsq.cli import common, corpus
from dsq.cli.progress import progress_bar
from dsq.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

DESCRIPTION = (
    "Run MODEL over calibration text, layer by layer, and write what quantizers need: the\n"
    "importance matrix and, on request, Hessians and output-gradient moments. A run that was\n"
    "killed goes on where it was when the same command is given again."
)
EXAMPLE = "dsq calibrate ./deepseek-coder-1.3b-base --text src/*.py -o stats.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_source(parser, "model", ".gguf, directory or hub id")
    corpus.add_arguments(parser)
    parser.add_argument("-o", "--output", type=Path, default=Path("stats.safetensors"))
    parser.add_argument(
        "--tokens", type=count, default=128 << 10, metavar="N", help="at most (default 128k)"
    )
    parser.add_argument("-c", "--ctx", type=common.positive, default=2048, metavar="N")
    parser.add_argument("--hessians", action="store_true", help="E[xxᵀ] of every input")
    parser.add_argument(
        "--gradients", action="store_true", help="E[(∂L/∂y)²] of every matrix, by a backward pass"
    )
    parser.add_argument(
        "--gradient-tokens",
        type=count,
        default=16 << 10,
        metavar="N",
        help="of how many of the tokens (default 16k)",
    )
    parser.add_argument(
        "--parse-special", action="store_true", help="control tokens in the text are meant as such"
    )
    parser.add_argument("--seed", type=int, default=0, help="draws windows, and labels (default 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    common.add_threads(parser)
    common.add_hub(parser)
    common.add_json(parser)


def count(text: str) -> int:
    """argparse type: a number of tokens, `128k` is 131,072."""
    match = re.fullmatch(r"(\d{1,9})([kKmM]?)", text)
    value = int(match[1]) << {"": 0, "k": 10, "m": 20}[match[2].lower()] if match else 0
    if not 0 < value <= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens; write 128k or 131072")
    return value


@dataclass(frozen=True)
class Texts:
    """Calibration text, and what is written of it in the statistics' record.

    `about["name"]` is what llama.cpp's files will call the data set.
    """

    pieces: list[str]
    about: dict[str, Any] = field(default_factory=dict)
    parse_special: bool = False


def texts(args: argparse.Namespace) -> Texts:
    """The text that the options name. Raises InputError for files that are no text."""
    from dsq.cli.eval import read_texts

    if not args.text:
        raise InputError("which text? give --text FILE…")
    pieces = read_texts(args.text)
    files = []
    for path, piece in zip(args.text, pieces, strict=True):
        if not piece.strip():
            raise InputError(f"{path}: the file is empty; leave it out")
        if "\0" in piece:
            raise InputError(
                f"{path}: binary (a NUL at character {piece.index(chr(0))}); give text files"
            )
        digest = hashlib.sha256(piece.encode()).hexdigest()
        files.append({"name": path.name, "n_chars": len(piece), "sha256": digest})
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    about = {"name": f"{files[0]['name']}{more}", "files": files}
    return Texts(pieces, about, getattr(args, "parse_special", False))


def windows(args: argparse.Namespace, model: Path) -> tuple[npt.NDArray[np.int32], dict[str, Any]]:
    """(windows, n_ctx) token ids of `model`, and the record of what they are from."""
    if (args.seed or 0) < 0:
        raise InputError(f"--seed {args.seed}: give 0 or more")
    if corpus.is_asked_for(args):
        return corpus.windows(args, model)
    found = texts(args)
    from dsq.convert.checkpoint import open_checkpoint
    from dsq.runtime.calibration.calibrate import Options, choose_windows

    options = Options(args.ctx, args.tokens, seed=args.seed)
    checkpoint = open_checkpoint(model)
    ids = choose_windows(checkpoint, found.pieces, options, parse_special=found.parse_special)
    return ids, found.about


def run(args: argparse.Namespace) -> int:
    corpus.take_model(args)
    model = common.local_model(args.model, args)
    ids, about = windows(args, model)
    from dsq.runtime.calibration.calibrate import Options, calibrate

    options = Options(
        hessians=args.hessians,
        gradients=args.gradients,
        n_gradient_tokens=args.gradient_tokens,
        seed=args.seed,
        device=args.device,
        n_threads=args.threads,
    )
    with progress_bar("calibrating", 1000, quiet=args.json) as advance:
        shown = 0

        def tell(done: int, total: int) -> None:
            nonlocal shown
            now = 1000 * done // total
            advance(now - shown)
            shown = now

        report = calibrate(
            model,
            args.output,
            ids,
            about_text=about,
            options=options,
            force=args.force,
            progress=tell,
        )
    if args.json:
        common.print_json(report.to_json())
        return 0
    if report.n_tokens < args.tokens - args.ctx:
        common.warn(
            f"the text gave {report.n_tokens:,} tokens of the {args.tokens:,} asked for; "
            "more text makes better statistics"
        )
    peak = f", peak memory {common.human(report.peak_bytes)}" if report.peak_bytes else ""
    again = f" (went on after {report.resumed_steps} steps)" if report.resumed_steps else ""
    parts = ["mean squares", *(["Hessians"] if report.hessians else [])]
    parts += ["gradients"] if report.n_gradient_tokens else []
    print(f"{report.out}: {', '.join(parts)}; {common.human(report.size_bytes)}{again}")
    print(
        f"{report.n_windows} windows of {report.n_ctx} tokens, {report.tokens_per_second:,.0f} "
        f"tokens/s on {report.device}{peak}"
    )
    return 0
