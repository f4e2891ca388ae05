"""`dsq convert` of a GPTQ or EXL2 directory: `--to gguf` keeps the codes, `--to hf` is dense."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsq.cli import common
from dsq.cli.eval import read_texts
from dsq.cli.progress import progress_bar
from dsq.errors import InputError

if TYPE_CHECKING:
    from dsq.convert.checkpoint import HfCheckpoint
    from dsq.convert.repack import RepackPlan

_LISTED = 3  # lossy matrices on the terminal; --json has them all
_WINDOWS = 8  # of 512 tokens, that a conversion is measured on


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
    texts = _texts(args, checkpoint)
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
            plan,
            out,
            force=args.force,
            threads=args.threads,
            allow_nonfinite=args.allow_nonfinite,
            progress=advance,
        )
    report |= {
        "files": [str(path) for path in artifact.paths],
        "size_bytes": artifact.size_bytes,
        "seconds": round(artifact.seconds, 3),
        "receipt": receipt,
        "divergence": _divergence(args, checkpoint, artifact.paths[0], receipt, texts),
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
    texts = _texts(args, checkpoint)
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
            allow_nonfinite=args.allow_nonfinite,
            pre=args.pre,
            progress=advance,
        )
    report |= {
        "size_bytes": artifact.size_bytes,
        "seconds": round(artifact.seconds, 3),
        "receipt": receipt,
        "divergence": _divergence(args, checkpoint, out, receipt, texts),
    }
    return _tell(args, report)


def _texts(args: argparse.Namespace, checkpoint: HfCheckpoint) -> list[str] | None:
    """What --text names, read before anything is written."""
    if not args.text:
        return None
    from dsq.runtime.torch_engine import require_torch

    require_torch(checkpoint.path)  # in which the exact codes run
    return read_texts(args.text)


def _divergence(
    args: argparse.Namespace,
    checkpoint: HfCheckpoint,
    made: Path,
    receipt: dict[str, Any],
    texts: list[str] | None,
) -> dict[str, Any] | None:
    """The KLD of what was made from the exact codes; None where it was not measured, or is none.

    A GGUF's is that of llama.cpp, which also rounds what goes into a product.
    """
    if texts is None or receipt["exact"]:
        return None
    from dsq.runtime.evaluate import evaluate

    try:
        drift = evaluate(
            made, texts=texts, ref=checkpoint.path, chunks=_WINDOWS, n_threads=args.threads
        ).drift
    except InputError as error:
        raise InputError(f"{made} is written, but was not measured: {error}") from error
    return {
        "kld_mean": drift.kld_mean,
        "kld_stderr": drift.kld_stderr,
        "tokens": drift.tokens,
        "text": [str(path) for path in args.text],
    }


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
    found = report["divergence"]
    if found is None:
        print("what that adds in KL divergence was not measured: --text FILE does it")
    else:
        print(
            f"KL divergence from the exact codes: {found['kld_mean']:.3g} ± "
            f"{found['kld_stderr']:.2g} on {found['tokens']:,} tokens"
        )
    return 0
