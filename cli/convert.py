"""`dsq convert`: a checkpoint to GGUF, GPTQ or EXL2, and a GGUF, GPTQ or EXL2 back to dense."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsq.cli import calibration_text, common, convert_exl2, convert_gptq, convert_packed
from dsq.cli.compensation import take_source
from dsq.cli.progress import progress_bar
from dsq.errors import InputError

if TYPE_CHECKING:
    from dsq.convert.checkpoint import HfCheckpoint

DESCRIPTION = (
    "Convert a Hugging Face checkpoint to GGUF, or (--to hf) a GGUF to Hugging Face, or either\n"
    "to a directory of GPTQ (--to gptq) or EXL2 weights (--to exl2), calibrated on text.\n"
    "A GPTQ or EXL2 directory becomes a GGUF by moving its codes, not rounded where the grids\n"
    "coincide, or (--to hf) dense weights; with --text, what is not lossless is measured on it."
)
EXAMPLE = "dsq convert ./deepseek-coder-1.3b-base --to gguf --outtype bf16 -o coder.gguf"

_CALIBRATED = ("gptq", "exl2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_source(parser, "src", "directory, hub id (org/name) or .gguf")
    parser.add_argument("--to", choices=("gguf", "hf", *_CALIBRATED), default="gguf")
    parser.add_argument(
        "--outtype",
        default="auto",
        metavar="TYPE",
        help="auto, f32, f16, bf16, q8_0, q4_k_m, … (auto: the type the weights are stored in)",
    )
    parser.add_argument("-o", "--output", type=Path, help="file, or directory (all but gguf)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    parser.add_argument("--split-max-size", type=common.size, metavar="4G", help="shard the GGUF")
    parser.add_argument("--pre", help="pre-tokenizer name, when it is not recognised")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="convert NaN and Inf weights as they are"
    )
    parser.add_argument("--allow-requantize", action="store_true", help="SRC may be quantized")
    parser.add_argument(
        "--exact",
        action="store_true",
        help="of a GPTQ or EXL2 directory: refuse whatever is not the same number afterwards",
    )
    parser.add_argument(
        "--dither",
        type=float,
        default=0.0,
        metavar="F",
        help="--to hf: add normal noise of F × each block's step, so that a model which was "
        "quantized before does not lie on its old grid when drift is measured",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --dither, or draws windows of text")
    common.add_threads(parser)
    common.add_hub(parser)
    common.add_json(parser)
    convert_gptq.add_arguments(parser)
    convert_exl2.add_arguments(parser)
    calibration_text.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    _check(args)
    packed = _packed_source(args)
    if packed is not None and not _is_requantized(args):
        return _of_packed(args, packed)
    if args.text and args.to not in _CALIBRATED:
        raise InputError(
            "--text: calibrates --to gptq and --to exl2, and measures what a GPTQ or EXL2 "
            "directory becomes; leave it out"
        )
    if args.exact:
        raise InputError("--exact: only of a GPTQ or EXL2 directory, whose codes are moved")
    if args.to == "gptq":
        return convert_gptq.run(args)
    if args.to == "exl2":
        return convert_exl2.run(args)
    if args.to == "hf":
        return _to_hf(args)
    from dsq.cli.quantize import convert_to_gguf

    return convert_to_gguf(args, args.outtype, allow_requantize=args.allow_requantize)


def _packed_source(args: argparse.Namespace) -> HfCheckpoint | None:
    """SRC as a checkpoint if it is a GPTQ or EXL2 directory."""
    from dsq.convert.checkpoint import HfCheckpoint, open_checkpoint
    from dsq.quant.presets import preset

    if args.to == "gguf" and args.outtype.lower() not in ("auto", "copy"):
        preset(args.outtype)  # an unknown type is told before a model is fetched
    source = common.local_model(args.src, args)
    args.src = str(source)
    if not source.is_dir():
        return None
    checkpoint = open_checkpoint(source)
    if isinstance(checkpoint, HfCheckpoint) and checkpoint.packed is not None:
        return checkpoint
    return None


def _is_requantized(args: argparse.Namespace) -> bool:
    """Whether a packed SRC is to be rounded to another quantized type, as was asked for."""
    plain = ("auto", "f32", "f16", "bf16", "q8_0")
    return args.to == "gguf" and args.allow_requantize and args.outtype.lower() not in plain


def _of_packed(args: argparse.Namespace, checkpoint: HfCheckpoint) -> int:
    if args.to in _CALIBRATED:
        convert_packed.refuse_again(checkpoint, args.to)
    if args.pre:
        from dsq.runtime.pre_check import check_pre

        check_pre(checkpoint, args.pre)
    if args.to == "hf":
        return convert_packed.to_hf(args, checkpoint)
    return convert_packed.to_gguf(args, checkpoint)


def _check(args: argparse.Namespace) -> None:
    """Refuse options of another format, and find a SRC that --text has swallowed."""
    if args.to != "gptq":
        calibration_text.refuse(args, convert_gptq.OPTIONS, "gptq")
    if args.to != "exl2":
        calibration_text.refuse(args, convert_exl2.OPTIONS, "exl2")
    if args.to != "hf" and args.dither:
        raise InputError("--dither goes with --to hf")
    take_source(args)
    if args.to not in _CALIBRATED:
        others = tuple(name for name in calibration_text.OPTIONS if name != "text")
        calibration_text.refuse(args, others, "gptq or --to exl2")
        return
    calibration_text.refuse(args, ("split_max_size", "allow_requantize"), "gguf")
    calibration_text.refuse(args, ("allow_nonfinite",), "gguf or --to hf")
    if args.outtype != "auto":
        raise InputError(f"--outtype {args.outtype}: --to {args.to} keeps what is not quantized")


def _to_hf(args: argparse.Namespace) -> int:
    from dsq.convert.checkpoint import GgufCheckpoint, open_checkpoint
    from dsq.convert.hf.writer import plan_to_hf, write_hf
    from dsq.convert.rope import describe
    from dsq.quant.stream import Dither

    if args.split_max_size:
        raise InputError("--split-max-size goes with --to gguf; --to hf cuts shards of 5 GiB")
    if args.dither < 0 or args.seed < 0:
        raise InputError(f"--dither {args.dither:g} --seed {args.seed}: give 0 or more")
    source = common.local_model(args.src, args)
    checkpoint = open_checkpoint(source)
    if not isinstance(checkpoint, GgufCheckpoint):
        raise InputError(f"{source} is a Hugging Face directory already; --to hf takes a .gguf")
    if args.pre:
        from dsq.runtime.pre_check import check_pre

        check_pre(checkpoint, args.pre)
    steps = plan_to_hf(checkpoint, args.outtype)
    dither = Dither(args.dither, args.seed) if args.dither else None
    if dither:
        dither.check(step.source for step in steps if step.source)
    out = args.output or Path(common.output_path(source, "hf").stem)
    report: dict[str, Any] = {
        "output": str(out),
        "type": steps[0].to.name,
        "rope": describe(checkpoint.spec.rope),
        "dither": args.dither,
        "tensors": len(steps),
        "size_bytes": sum(s.n_bytes for s in steps),
    }
    if args.dry_run:
        report["plan"] = [s.to_json() for s in steps]
    else:
        with progress_bar(f"→ {out}", report["size_bytes"], quiet=args.json) as advance:
            artifact = write_hf(
                checkpoint,
                steps,
                out,
                force=args.force,
                threads=args.threads,
                allow_nonfinite=args.allow_nonfinite,
                dither=dither,
                pre=args.pre,
                progress=advance,
            )
        report["seconds"] = round(artifact.seconds, 3)
        report["size_bytes"] = artifact.size_bytes
    if args.json:
        common.print_json(report)
    elif args.dry_run:
        for step in steps:
            print(f"{step.name:<52} {step.stored!s:>6} → {step.to!s:<5} {step.shape}")
    else:
        print(
            f"{out}: {len(steps)} tensors, {report['type']}, "
            f"{common.human(report['size_bytes'])}, RoPE {report['rope']}"
        )
    return 0
