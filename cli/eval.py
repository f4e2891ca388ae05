"""`dsq eval`: perplexity, and how far a model drifted from a reference."""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path
from typing import Any

from dsq.cli import common
from dsq.cli.progress import progress_bar
from dsq.errors import InputError

DESCRIPTION = (
    "Measure perplexity by llama.cpp's own protocol and, with --ref, the divergence from that\n"
    "model's predictions. MODEL and REF may be GGUF files or Hugging Face directories (those run\n"
    "in transformers, float32; of GPTQ and EXL2 the exact codes)."
)
EXAMPLE = "dsq eval coder-q4_0.gguf --ref coder-bf16.gguf --text src/*.py"

# What is measured when no text is given: code that every machine has.
STANDARD_LIBRARY = ("argparse.py", "ast.py", "dataclasses.py", "inspect.py", "pathlib.py")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_source(parser, "model", ".gguf, directory or hub id")
    parser.add_argument("--ref", help="the reference: .gguf, directory or hub id")
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="what to measure on (default: some modules of this Python's standard library)",
    )
    parser.add_argument("-c", "--ctx", "--ctx-size", type=common.positive, default=512)
    parser.add_argument("--chunks", type=common.positive, metavar="N", help="windows to measure")
    parser.add_argument("--no-cache", action="store_true", help="do not keep reference logits")
    common.add_gpu(parser)
    common.add_threads(parser)
    common.add_hub(parser)
    common.add_json(parser)


def read_texts(paths: list[Path] | None) -> list[str]:
    """The texts of `paths`, or the default's. Raises InputError for what cannot be read."""
    if paths is None:
        stdlib = Path(sysconfig.get_path("stdlib"))
        paths = [stdlib / name for name in STANDARD_LIBRARY if (stdlib / name).is_file()]
    texts = []
    for path in paths:
        try:
            texts.append(path.read_bytes().decode("utf-8"))  # no newline translation
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: not UTF-8 at byte {error.start}; convert it first"
            ) from error
        except OSError as error:
            raise InputError(f"{path}: cannot read the text: {error.strerror}") from error
    return texts


def run(args: argparse.Namespace) -> int:
    if args.model is None and args.text and args.text[-1].suffix == ".gguf":
        args.model = str(args.text.pop())  # `--text a.txt model.gguf`: --text takes all it can get
    texts = read_texts(args.text or None)
    model = common.local_model(args.model, args)
    ref = common.local_model(args.ref, args) if args.ref else None
    from dsq.runtime.evaluate import evaluate

    with progress_bar("measuring", 1000, quiet=args.json) as advance:
        shown = 0

        def tell(what: str, done: int, total: int, ppl: float) -> None:
            nonlocal shown
            passes = 2 if ref else 1
            before = 0 if what == "reference" or not ref else 1
            now = int(1000 * (before + done / total) / passes)
            advance(now - shown)
            shown = now

        report = evaluate(
            model,
            texts=texts,
            ref=ref,
            n_ctx=args.ctx,
            chunks=args.chunks,
            n_threads=args.threads,
            n_gpu_layers=common.gpu_layers(args),
            use_cache=not args.no_cache,
            progress=tell,
        ).to_json()
    report["text"] = [str(p) for p in args.text] if args.text else list(STANDARD_LIBRARY)
    if args.json:
        common.print_json(report)
    else:
        _print(report)
    return 0


def _print(report: dict[str, Any]) -> None:
    rows = [
        ("model", f"{report['model']}, {common.human(report['size_bytes'])}"),
        ("bits per weight", f"{report['bpw']:.3f}"),
        ("perplexity", f"{report['ppl']:.4f} ± {report['ppl_stderr']:.4f}"),
    ]
    if report["ref"]:
        rows += [
            ("reference", f"{report['ref']}, perplexity {report['ref_ppl']:.4f}"),
            (
                "KL divergence",
                f"mean {report['kld_mean']:.6f}, median {report['kld_median']:.6f}, "
                f"99 % {report['kld_p99']:.4f}, 99.9 % {report['kld_p999']:.4f}, "
                f"max {report['kld_max']:.4f}",
            ),
            ("same top token", f"{100 * report['top1_agreement']:.2f} %"),
            ("RMS Δp", f"{100 * report['rms_dp']:.3f} %"),
        ]
    rows += [
        ("measured on", f"{report['tokens']:,} tokens; {report['protocol']}"),
        ("speed", f"{report['tokens_per_second']:,.0f} tokens/s"),
    ]
    for label, text in rows:
        print(f"{label:<16} {text}")
