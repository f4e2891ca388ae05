"""`dsq convert --to exl2`: its options, and one call."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsq.cli import calibration_text, common
from dsq.cli.progress import progress_bar
from dsq.errors import InputError

if TYPE_CHECKING:
    from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
    from dsq.runtime.fidelity.exl2_plan import Plan

OPTIONS = ("bpw", "head_bits", "measurement")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("EXL2")
    group.add_argument(
        "--bpw",
        type=float,
        metavar="B",
        help="bits a weight of the decoder layers, scales and all, such as 4.0",
    )
    group.add_argument(
        "--head-bits",
        type=int,
        choices=(2, 3, 4, 5, 6, 8, 16),
        help="of the output head (default 6; 16: not quantized)",
    )
    group.add_argument(
        "--measurement",
        type=Path,
        metavar="FILE",
        help="measurement.json of an earlier conversion of this model, dsq's or exllamav2's: "
        "nothing is measured again",
    )


def run(args: argparse.Namespace) -> int:
    from dsq.convert.checkpoint import open_checkpoint
    from dsq.convert.hf.quantized_dir import check_output
    from dsq.convert.rope import describe
    from dsq.quant.stats import read_stats
    from dsq.runtime.calibration.workdir import WorkDir
    from dsq.runtime.fidelity.exl2 import convert

    if args.bpw is None:
        raise InputError("--to exl2: how large? give --bpw B, such as --bpw 4.0")
    source = common.local_model(args.src, args)
    checkpoint = open_checkpoint(source)
    if args.pre:
        from dsq.runtime.pre_check import check_pre

        check_pre(checkpoint, args.pre)
    plan = _plan(args, checkpoint)
    out = args.output or Path(common.output_path(source, f"exl2-{args.bpw:g}bpw").stem)
    report: dict[str, Any] = {
        "output": str(out),
        "size_bytes": plan.size_bytes,
        "rope": describe(checkpoint.spec.rope),
    }
    if args.dry_run:
        report |= {"bpw": args.bpw, "head_bits": plan.options.head_bits, "exact": False}
        if args.json:
            common.print_json(report)
        else:
            print(
                f"{out}: EXL2, {args.bpw:g} bits a weight in {len(plan.shapes)} matrices, head of "
                f"{plan.options.head_bits} bits, about {common.human(plan.size_bytes)}; which "
                "matrix gets which bits is known after the measurement"
            )
        return 0
    force = args.force or WorkDir.owns(out.resolve())
    check_output(out.resolve(), force=force)  # before the reading, which takes a while
    text = calibration_text.windows(args, checkpoint)
    with progress_bar(f"→ {out}", 1000, quiet=args.json) as advance:
        made = convert(
            plan,
            text.ids,
            out,
            about_text=text.about,
            stats=read_stats(args.stats) if args.stats else None,
            force=args.force,
            pre=args.pre,
            progress=_share(advance),
        )
    if args.json:
        common.print_json({**report, **made.to_json(), "text": text.about})
        return 0
    again = f" (went on after {made.resumed_steps} steps)" if made.resumed_steps else ""
    print(
        f"{out}: EXL2, {made.bpw:.3f} bits a weight in the layers, {made.file_bpw:.3f} in all "
        f"(head {made.head_bits} bits, embedding f16), {common.human(made.size_bytes)}, RoPE "
        f"{report['rope']}{again}"
    )
    foretold = "" if made.predicted_kld is None else f", predicted KLD {made.predicted_kld:.4g}"
    print(
        f"{len(made.tensors)} matrices on {made.n_tokens:,} tokens in {made.seconds:.0f} s, "
        f"{made.measure_seconds:.0f} of them to measure{foretold}"
    )
    return 0


def _share(advance: Any) -> Any:
    """A progress in steps, shown in thousandths."""
    shown = 0

    def tell(done: int, total: int) -> None:
        nonlocal shown
        now = 1000 * done // total
        advance(now - shown)
        shown = now

    return tell


def _plan(args: argparse.Namespace, checkpoint: HfCheckpoint | GgufCheckpoint) -> Plan:
    from dsq.quant.solver import DAMP
    from dsq.runtime.fidelity.exl2_plan import Options, plan_exl2

    options = Options(
        args.bpw,
        6 if args.head_bits is None else args.head_bits,
        damp=DAMP if args.damp is None else args.damp,
        n_threads=args.threads,
        device=args.device or "auto",
    )
    return plan_exl2(checkpoint, options, args.measurement)
