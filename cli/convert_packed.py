"""`dsq convert` of a GPTQ or EXL2 directory: `--to gguf` keeps the codes, `--to hf` is dense."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsq.cli import common
from dsq.cli.progress import progress_bar
from dsq.errors import InputError

if TYPE_CHECKING:
    from dsq.convert.checkpoint import HfCheckpoint
    from dsq.convert.repack import RepackPlan

_LISTED = 3  # lossy matrices on the terminal; --json has them all


def refuse_again(checkpoint: HfCheckpoint, to: str) -> None:
    """Raise InputError: what was quantized once is not calibrated and quantized again."""
    assert checkpoint.packed is not None
    raise InputError(
        f"{checkpoint.path} is {checkpoint.packed.method} already: --to {to} would round it a "
        f"second time; give the model that it was made from, or take --to gguf, which keeps its "
        f"codes, or --to hf"
    )


def to_gguf(args: argparse.Namespace, checkpoint: HfCheckpoint) -> int:
    """Repack, and say how far a weight may be off."""
    from dsq.convert.repack import float_type, plan_repack, run_repack

    plan = plan_repack(
        checkpoint,
        exact=args.exact,
        to=float_type(args.outtype),
        split_max_bytes=args.split_max_size,
        pre=args.pre,
    )
    method = _method(checkpoint)
    out = args.output or common.output_path(checkpoint.path, f"{method}-repacked")
    report = _report(checkpoint, out, plan.gguf.layout.data_bytes)
    if args.dry_run:
        report |= {"exact": plan.is_exact, "plan": _choices(plan)}
        if args.json:
            common.print_json(report)
        else:
            for e in report["plan"]:
                print(f"{e['name']:<32} {e['source']:>12} → {e['type']:<5} {e['why']}".rstrip())
        return 0
    with progress_bar(f"→ {out}", plan.gguf.layout.data_bytes, quiet=args.json) as advance:
        artifact, receipt = run_repack(
            plan, out, force=args.force, threads=args.threads, progress=advance
        )
    report |= {
        "files": [str(path) for path in artifact.paths],
        "size_bytes": artifact.size_bytes,
        "seconds": round(artifact.seconds, 3),
        "receipt": receipt,
    }
    return _tell(args, report)


def to_hf(args: argparse.Namespace, checkpoint: HfCheckpoint) -> int:
    """Unpack to dense weights."""
    from dsq.convert.unpack import plan_unpack, run_unpack

    if args.split_max_size:
        raise InputError("--split-max-size goes with --to gguf; --to hf cuts shards of 5 GiB")
    if args.dither:
        raise InputError("--dither goes with a .gguf; a packed directory is unpacked as it is")
    steps = plan_unpack(checkpoint, args.outtype, exact=args.exact)
    out = args.output or Path(common.output_path(checkpoint.path, "hf").stem)
    size = sum(step.n_bytes for step in steps)
    report = _report(checkpoint, out, size)
    if args.dry_run:
        report["plan"] = [step.to_json() for step in steps]
        if args.json:
            common.print_json(report)
        else:
            for step in steps:
                print(f"{step.name:<52} → {step.to!s:<5} {step.shape}")
        return 0
    with progress_bar(f"→ {out}", size, quiet=args.json) as advance:
        artifact, receipt = run_unpack(
            checkpoint,
            steps,
            out,
            force=args.force,
            threads=args.threads,
            pre=args.pre,
            progress=advance,
        )
    report |= {
        "size_bytes": artifact.size_bytes,
        "seconds": round(artifact.seconds, 3),
        "receipt": receipt,
    }
    return _tell(args, report)


def _method(checkpoint: HfCheckpoint) -> str:
    assert checkpoint.packed is not None
    return checkpoint.packed.method


def _report(checkpoint: HfCheckpoint, out: Path, size_bytes: int) -> dict[str, Any]:
    from dsq.convert.rope import describe

    return {
        "output": str(out),
        "source_format": _method(checkpoint),
        "rope": describe(checkpoint.spec.rope),
        "size_bytes": size_bytes,
    }


def _choices(plan: RepackPlan) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "source": choice.source,
            "type": choice.to.name,
            "how": choice.recipe.value,
            "exact": choice.is_exact,
            "why": choice.why,
        }
        for name, choice in plan.choices.items()
    ]


def _tell(args: argparse.Namespace, report: dict[str, Any]) -> int:
    if args.json:
        common.print_json(report)
        return 0
    receipt = report["receipt"]
    types = ", ".join(f"{n} × {name}" for name, n in receipt["types"].items())
    print(
        f"{report['output']}: from {report['source_format']}, {common.human(report['size_bytes'])}"
        f" ({types}), RoPE {report['rope']}"
    )
    if receipt["exact"]:
        print("lossless: every weight is the source's own number")
        return 0
    largest = receipt["largest_difference"]
    bound = "not measured" if largest is None else f"{largest:.3g}"
    print(
        f"{receipt['lossy_tensors']} of {len(receipt['tensors'])} matrices are not lossless; the "
        f"largest difference of a weight is {bound}"
    )
    reasons = Counter(t["why"] for t in receipt["tensors"] if not t["exact"] and t["why"])
    for why, n in reasons.most_common(_LISTED):
        print(f"  {n} ×: {why}")
    return 0
