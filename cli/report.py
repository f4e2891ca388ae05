"""`dsq report`: one page on what each quantized file cost."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsq.cli import common
from dsq.cli.eval import STANDARD_LIBRARY, read_texts
from dsq.cli.progress import progress_bar
from dsq.errors import InputError

if TYPE_CHECKING:
    from dsq.runtime.report.measure import Report

DESCRIPTION = (
    "Measure several files against one reference and write report.html (one page, nothing else\n"
    "needed), report.png and report.json: divergence and perplexity against bits per weight, the\n"
    "worst tokens, the error of each layer, memory."
)
EXAMPLE = "dsq report coder-q8_0.gguf coder-q4_k_m.gguf coder-q4_0.gguf --ref coder-bf16.gguf"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help=".gguf, directory or hub id")
    parser.add_argument("--ref", required=True, help="the reference: .gguf, directory or hub id")
    parser.add_argument(
        "--text",
        type=Path,
        action="append",
        metavar="FILE",
        help="what to measure on; may be repeated (default: modules of the standard library)",
    )
    parser.add_argument("-c", "--ctx", "--ctx-size", type=common.positive, default=512)
    parser.add_argument("--chunks", type=common.positive, metavar="N", help="windows to measure")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"))
    parser.add_argument("--no-layers", action="store_true", help="leave out the layers' errors")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    common.add_threads(parser)
    common.add_hub(parser)
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.output.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"-o {args.output}: the page's name must end in .html")
    targets = [args.output, args.output.with_suffix(".png"), args.output.with_suffix(".json")]
    texts = read_texts(args.text)
    ref = common.local_model(args.ref, args)
    models = [common.local_model(model, args) for model in args.models]
    from dsq.convert.atomic import atomic_files, check_target
    from dsq.runtime.report import figures, page
    from dsq.runtime.report.measure import report

    for path in targets:
        check_target(path, force=args.force)

    with progress_bar("measuring", 1000 * len(models), quiet=args.json) as advance:
        shown = 0

        def progress(path: Path) -> Any:
            start = 1000 * models.index(path)

            def tell(what: str, done: int, total: int, ppl: float) -> None:
                nonlocal shown
                now = start + int(500 * ((what == "model") + done / total))
                advance(max(0, now - shown))
                shown = max(now, shown)

            return tell

        result = report(
            models,
            ref,
            texts=texts,
            text_names=[str(p) for p in args.text] if args.text else STANDARD_LIBRARY,
            n_ctx=args.ctx,
            chunks=args.chunks,
            n_threads=args.threads,
            layers=not args.no_layers,
            progress=progress,
        )
    content = result.to_json()
    with atomic_files(targets) as (as_html, as_png, as_json):
        as_html.write_text(page.html(result), encoding="utf-8")
        as_png.write_bytes(figures.quality(result, "png"))
        as_json.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    if args.json:
        common.print_json({"output": [str(path) for path in targets], **content})
    else:
        _print(result, targets)
    return 0


def _print(result: Report, targets: list[Path]) -> None:
    width = max(5, *(len(entry.name) for entry in result.entries))
    print(f"{'model':<{width}}  {'MiB':>8}  {'bpw':>5}  {'PPL':>9}  {'mean KLD':>9}  same top")
    for entry in result.entries:
        m = entry.measured
        print(
            f"{entry.name:<{width}}  {m['size_bytes'] / 2**20:8.1f}  {m['bpw']:5.2f}  "
            f"{m['ppl']:9.4f}  {m['kld_mean']:9.5f}  {100 * m['top1_agreement']:6.2f} %"
        )
    print(f"→ {', '.join(map(str, targets))}")
