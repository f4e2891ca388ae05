"""`dsq convert --to gptq`: its options, and one call."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsq.cli import calibration_text, common
from dsq.cli.calibrate import count
from dsq.cli.compensation import tell_distilled
from dsq.cli.progress import progress_bar
from dsq.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsq.runtime.fidelity.gptq_plan import Plan

OPTIONS = (
    *("bits", "group_size", "act_order", "static_groups", "sym", "asym", "format", "dynamic"),
    *("allow_ragged", "distill"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("GPTQ")
    group.add_argument("--bits", type=int, choices=(2, 3, 4, 8), help="default 4")
    group.add_argument(
        "--group-size",
        type=int,
        choices=(32, 64, 128, -1),
        help="inputs under one scale; -1: all (default 128)",
    )
    group.add_argument(
        "--act-order",
        action="store_true",
        help="the columns of the largest activations first: more faithful; groups are scattered, "
        "which some kernels read slowly, unless --static-groups",
    )
    group.add_argument(
        "--static-groups",
        action="store_true",
        help="groups stay runs of inputs with --act-order: about as faithful, and a GGUF can be "
        "made of the codes",
    )
    sym = group.add_mutually_exclusive_group()
    sym.add_argument("--sym", action="store_true", help="no zero points (default)")
    sym.add_argument("--asym", action="store_true", help="zero points: fewer kernels read them")
    group.add_argument("--format", choices=("gptq", "gptq_v2"), help="default gptq")
    group.add_argument(
        "--dynamic",
        type=_dynamic,
        action="append",
        metavar="REGEX=bits:group",
        help="other bits, or `none` to leave as they are, for matrices whose name starts with a "
        "match; may be repeated, the first wins",
    )
    group.add_argument(
        "--allow-ragged",
        action="store_true",
        help="the last group of a row may be short: GPTQModel reads it, transformers on the CPU "
        "does not",
    )
    group.add_argument(
        "--distill",
        type=count,
        metavar="N",
        help="tune scales and norm gains on N of the tokens, until the model predicts as SRC does",
    )


def _dynamic(text: str) -> tuple[str, int | None, int | None]:
    match = re.fullmatch(r"(.+)=(?:none|([2348])(?::(-1|32|64|128))?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r}; write REGEX=bits, REGEX=bits:group or REGEX=none, such as .*down_proj=8:32"
        )
    try:
        re.compile(match[1])
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"{match[1]!r} is no regular expression: {error}"
        ) from None
    return match[1], int(match[2]) if match[2] else None, int(match[3]) if match[3] else None


def run(args: argparse.Namespace) -> int:
    from dsq.convert.checkpoint import open_checkpoint
    from dsq.convert.hf.quantized_dir import check_output
    from dsq.convert.rope import describe
    from dsq.runtime.calibration.workdir import WorkDir
    from dsq.runtime.fidelity.gptq import convert

    if args.static_groups and not args.act_order:
        raise InputError("--static-groups: only with --act-order; without it groups are in order")
    source = common.local_model(args.src, args)
    checkpoint = open_checkpoint(source)
    if args.pre:
        from dsq.runtime.pre_check import check_pre

        check_pre(checkpoint, args.pre)
    plan = _plan(args, checkpoint)
    scheme = plan.options.scheme
    out = args.output or Path(common.output_path(source, f"gptq-{scheme.bits}bit").stem)
    report: dict[str, Any] = {
        "output": str(out),
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "bpw": round(plan.bpw, 4),
        "size_bytes": plan.size_bytes,
        "dense_type": plan.dense.name,
        "rope": describe(checkpoint.spec.rope),
    }
    if args.dry_run:
        tensors = [[t.name, t.dtype, list(t.shape)] for t in plan.tensors]
        if args.json:
            common.print_json({**report, "plan": tensors})
        else:
            for name, dtype, shape in tensors:
                print(f"{name:<52} {dtype:>5} {tuple(shape)}")
        return 0
    free = args.force or WorkDir.owns(out.resolve())
    check_output(out.resolve(), force=free)  # before the reading, which takes a while
    text = calibration_text.windows(args, checkpoint)
    with progress_bar(f"→ {out}", 1000, quiet=args.json) as advance:
        made = convert(
            plan,
            text.ids,
            out,
            force=args.force,
            pre=args.pre,
            progress=_thousandths(advance),
        )
    if args.json:
        common.print_json({**report, **made.to_json(), "text": text.about})
        return 0
    share = sum(t.error for t in made.tensors) / max(1, len(made.tensors))
    again = f" (went on after {made.resumed_layers} layers)" if made.resumed_layers else ""
    print(
        f"{out}: GPTQ of {scheme.bits} bits, groups of {scheme.group_size}, {made.bpw:.2f} bits a "
        f"weight, {common.human(made.size_bytes)}, RoPE {report['rope']}{again}"
    )
    dampings = ", ".join(f"{d:g}" for d in sorted({t.damp for t in made.tensors}))
    print(
        f"{len(made.tensors)} matrices on {made.n_tokens:,} tokens in {made.seconds:.0f} s: damp "
        f"{dampings}, {share:.2f} of plain rounding's error in a layer"
    )
    if made.distillation is not None:
        tell_distilled(made.distillation.to_json())
    return 0


def _thousandths(advance: Callable[[int], None]) -> Callable[[float], None]:
    """A progress in shares, for a bar of thousand steps."""
    shown = 0

    def tell(share: float) -> None:
        nonlocal shown
        now = int(1000 * share)
        advance(now - shown)
        shown = now

    return tell


def _plan(args: argparse.Namespace, checkpoint: Any) -> Plan:
    from dsq.quant.gptq import Scheme
    from dsq.quant.solver import DAMP
    from dsq.runtime.fidelity import distill
    from dsq.runtime.fidelity.gptq_plan import Options, Override, plan_gptq

    scheme = Scheme(
        args.bits or 4,
        args.group_size or 128,
        sym=not args.asym,
        act_order=args.act_order,
        static_groups=args.static_groups,
    )
    options = Options(
        scheme,
        args.format or "gptq",
        tuple(Override(*entry) for entry in args.dynamic or ()),
        allow_ragged=args.allow_ragged,
        damp=DAMP if args.damp is None else args.damp,
        n_threads=args.threads,
        device=args.device or "auto",
        distill=distill.Options(seed=args.seed) if args.distill else None,
        distill_tokens=args.distill,
    )
    return plan_gptq(checkpoint, options)
