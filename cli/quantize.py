"""`dsq quantize`: any of llama-quantize's types, from a GGUF or straight from a checkpoint."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsq.cli import best, common, compensation
from dsq.cli.progress import progress_bar
from dsq.errors import InputError
from dsq.quant.plan import Options
from dsq.quant.scheme import GgmlType, target_type

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
    from dsq.convert.pipeline import GgufPlan
    from dsq.runtime.calibration.workdir import WorkDir

DESCRIPTION = (
    "Quantize SRC to TYPE. SRC may be a GGUF, a Hugging Face directory or a hub id: from a\n"
    "checkpoint this is one pass, with no 16-bit file in between. The tensor data equals that of\n"
    "llama.cpp's converter and llama-quantize, byte for byte."
)
EXAMPLE = "dsq quantize q4_k_m ./deepseek-coder-1.3b-base -o coder-q4_k_m.gguf"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "type",
        metavar="TYPE",
        help="q4_0, q4_k_m, iq4_xs, …, llama.cpp's number for it, copy, or best-4.5",
    )
    common.add_source(parser, "src", ".gguf, directory or hub id (org/name)")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--imatrix", type=Path, metavar="FILE", help="llama.cpp's, GGUF or .dat")
    parser.add_argument("--pure", action="store_true", help="one type for all, no mix")
    parser.add_argument("--leave-output-tensor", action="store_true", help="keep output.weight")
    parser.add_argument("--output-tensor-type", type=_type, metavar="T")
    parser.add_argument("--token-embedding-type", type=_type, metavar="T")
    parser.add_argument(
        "--tensor-type",
        type=_tensor_type,
        action="append",
        default=[],
        metavar="REGEX=T",
        help="the type of the tensors whose name matches; may be repeated, the first wins",
    )
    parser.add_argument("--allow-requantize", action="store_true", help="SRC may be quantized")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    parser.add_argument("--split-max-size", type=common.size, metavar="4G", help="shard the GGUF")
    parser.add_argument("--pre", help="pre-tokenizer name, when it is not recognised")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="convert NaN and Inf weights as they are"
    )
    compensation.add_arguments(parser)
    best.add_arguments(parser)
    common.add_threads(parser)
    common.add_hub(parser)
    common.add_json(parser)


def _type(text: str) -> GgmlType:
    try:
        return target_type(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _tensor_type(text: str) -> tuple[re.Pattern[str], GgmlType]:
    pattern, _, name = text.rpartition("=")
    if not pattern:
        raise argparse.ArgumentTypeError(f"{text!r}; write REGEX=TYPE, e.g. ffn_down=q6_k")
    try:
        return re.compile(pattern.lower()), _type(name)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{pattern!r} is no regular expression: {error}") from None


def run(args: argparse.Namespace) -> int:
    if best.asked(args):
        return best.run(args)
    compensation.check(args)
    options = Options(
        pure=args.pure,
        leave_output_tensor=args.leave_output_tensor,
        output_tensor_type=args.output_tensor_type,
        token_embedding_type=args.token_embedding_type,
        tensor_types=tuple(args.tensor_type),
    )
    return convert_to_gguf(
        args,
        args.type,
        options=options,
        imatrix_path=args.imatrix,
        allow_requantize=args.allow_requantize,
        calibrated=compensation.is_asked_for(args),
    )


def convert_to_gguf(
    args: argparse.Namespace,
    type_name: str,
    *,
    options: Options | None = None,
    imatrix_path: Path | None = None,
    allow_requantize: bool = False,
    calibrated: bool = False,
) -> int:
    """Plan, write, report: what `dsq quantize` and `dsq convert --to gguf` share."""
    from dsq.convert.checkpoint import open_checkpoint
    from dsq.convert.imatrix import read_imatrix
    from dsq.convert.pipeline import file_preset, plan_gguf
    from dsq.convert.tensor_plan import auto_outtype
    from dsq.quant.presets import preset as find_preset

    copy = type_name.lower() == "copy"
    named = None if type_name == "auto" or copy else find_preset(type_name)  # before any I/O
    source = common.local_model(args.src, args)
    checkpoint = open_checkpoint(source)
    if args.pre:
        from dsq.runtime.pre_check import check_pre

        check_pre(checkpoint, args.pre)
    preset = named or file_preset(checkpoint) or auto_outtype(checkpoint.tensors.values())
    if copy:
        options = replace(options or Options(), only_copy=True)
    imatrix = read_imatrix(imatrix_path, checkpoint) if imatrix_path else None
    found = compensation.calibration(args, checkpoint) if calibrated else None
    if found and (args.method == "compensated" or args.stats):
        imatrix = found.imatrix
    plan = plan_gguf(
        checkpoint,
        preset,
        options=options,
        imatrix=imatrix,
        allow_requantize=allow_requantize,
        split_max_bytes=args.split_max_size,
        pre=args.pre,
    )
    for pattern, named_type in options.tensor_types if options else ():
        if not any(pattern.search(step.name) for step in plan.steps):
            raise InputError(f"--tensor-type {pattern.pattern}={named_type}: no tensor matches")
    out = args.output or common.output_path(source, preset.name)
    return write(args, checkpoint, plan, found, out)


def write(
    args: argparse.Namespace,
    checkpoint: HfCheckpoint | GgufCheckpoint,
    plan: GgufPlan,
    found: compensation.Calibration | None,
    out: Path,
    more: Mapping[str, Any] | None = None,
    work: WorkDir | None = None,
) -> int:
    """Carry the plan out and report; `more` goes into the JSON report as it is.

    With `work` it is the last step of a longer run in that folder, which is then finished.
    """
    from dsq.convert.pipeline import with_method
    from dsq.convert.rope import describe

    if found:
        n_tokens = int(found.ids.size)
        plan = with_method(plan, compensation.method(args), text=found.text, n_tokens=n_tokens)
    report: dict[str, Any] = {"output": str(out), **plan.to_json(), **(more or {})}
    if not args.dry_run:
        del report["tensors"]
        carry_out = partial(_carry_out, args, checkpoint, plan, found)
        if work is None:
            report |= carry_out(out, force=args.force)
        else:
            report |= _in_folder(args, checkpoint, plan, work, carry_out, out)
    elif work is not None:
        work.leave()
    if args.json:
        common.print_json(report)
    else:
        _print(plan, report, describe(checkpoint.spec.rope), dry_run=args.dry_run)
        if "compensation" in report:
            compensation.tell(report["compensation"])
        if "distillation" in report:
            compensation.tell_distilled(report["distillation"])
    return 0


def _in_folder(
    args: argparse.Namespace,
    checkpoint: HfCheckpoint | GgufCheckpoint,
    plan: GgufPlan,
    work: WorkDir,
    carry_out: compensation.Quantize,
    out: Path,
) -> dict[str, Any]:
    """Written once in `work`, then named."""
    from dsq.convert.atomic import DiskError
    from dsq.convert.pipeline import check_outputs

    try:
        check_outputs(checkpoint, plan, out, force=args.force)
    except InputError as error:  # it came while we worked: what is done is kept
        raise DiskError(str(error)) from error
    report: dict[str, Any] = work.once(
        "written", lambda: carry_out(work.path / out.name, force=True)
    )
    names = [Path(file).name for file in report["files"]]
    places = {name: out.with_name(name) for name in names}
    work.finish_all(places)
    return {**report, "files": [str(place) for place in places.values()]}


def _carry_out(
    args: argparse.Namespace,
    checkpoint: HfCheckpoint | GgufCheckpoint,
    plan: GgufPlan,
    found: compensation.Calibration | None,
    out: Path,
    *,
    force: bool,
) -> dict[str, Any]:
    """Carry the plan out; what the report says of it."""
    run = partial(_run, args, checkpoint, plan, found)
    if found and args.distill:
        return compensation.with_distillation(args, checkpoint, plan, found, out, run, force=force)
    return run(out, force=force)


def _run(
    args: argparse.Namespace,
    checkpoint: HfCheckpoint | GgufCheckpoint,
    plan: GgufPlan,
    found: compensation.Calibration | None,
    out: Path,
    *,
    force: bool,
) -> dict[str, Any]:
    """The file as it is before distillation."""
    from dsq.convert.pipeline import run_gguf_plan

    with progress_bar(f"→ {out}", plan.layout.data_bytes, quiet=args.json) as advance:
        if found and args.method == "compensated":
            return compensation.quantized(
                args, checkpoint, plan, found, out, force=force, progress=advance
            )
        artifact = run_gguf_plan(
            checkpoint,
            plan,
            out,
            force=force,
            threads=args.threads,
            allow_nonfinite=args.allow_nonfinite,
            progress=advance,
        )
    return {
        "files": [str(p) for p in artifact.paths],
        "size_bytes": artifact.size_bytes,
        "seconds": round(artifact.seconds, 3),
    }


def _print(plan: GgufPlan, report: dict[str, Any], rope: str, *, dry_run: bool) -> None:
    if dry_run:
        for step in plan.steps:
            shape = " × ".join(map(str, step.shape))
            print(f"{step.name:<32} {step.stored!s:>6} → {step.to!s:<8} {shape}")
    types = ", ".join(f"{n} × {t}" for t, n in report["tensors_by_type"].items())
    files = report.get("files", [])
    where = f"{files[0]} and {len(files) - 1} more" if len(files) > 1 else report["output"]
    print(
        f"{'would write ' if dry_run else ''}{where}: {plan.preset.name}, {plan.bpw:.2f} bpw, "
        f"{common.human(report['size_bytes'])} ({types}), RoPE {rope}"
    )
