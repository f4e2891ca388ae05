"""`dsq quantize best-4.5`, `--target-bpw`, `--recipe`: types found by measuring."""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dsq.cli import common, compensation
from dsq.cli.calibrate import windows
from dsq.errors import InputError

if TYPE_CHECKING:
    from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
    from dsq.convert.imatrix import Imatrix
    from dsq.quant.mix import Recipe
    from dsq.quant.stats import Stats
    from dsq.runtime.fidelity.mix import Budget, Table

_TARGETS = ("target_bpw", "target_size", "target_kld", "vram")
_BEST = re.compile(r"best-(\d+(?:\.\d+)?)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "a mix found by measuring",
        "instead of TYPE: the types of least divergence under a budget, from --stats (of dsq\n"
        "calibrate --hessians --gradients) or --calibrate. TYPE best-4.5 calibrates, mixes,\n"
        "compensates and distills, and keeps what held-out text confirms (needs torch)",
    )
    group.add_argument("--target-bpw", type=_positive, metavar="N", help="bits a weight")
    group.add_argument("--target-size", type=common.size, metavar="S", help="like 3.9GiB")
    group.add_argument("--target-kld", type=_positive, metavar="X", help="mean KLD, in nats")
    group.add_argument(
        "--vram", type=common.size, metavar="S", help="the card's memory; --ctx is the context"
    )
    group.add_argument("--recipe", type=Path, metavar="FILE", help="the types of a saved recipe")
    group.add_argument("--save-recipe", type=Path, metavar="FILE", help="write the types as JSON")


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return value


def asked(args: argparse.Namespace) -> bool:
    """Whether the types are to be found here. Raises InputError for a muddle."""
    targets = [name for name in _TARGETS if getattr(args, name) is not None]
    named = [f"--{name.replace('_', '-')}" for name in targets]
    named += ["--recipe"] if args.recipe else []
    is_best = _BEST.fullmatch(args.type or "") is not None
    if len(named) + is_best > 1:
        both = ", ".join(named + ([args.type] if is_best else []))
        raise InputError(f"{both}: give one target")
    if args.save_recipe and not (named or is_best):
        raise InputError("--save-recipe: only with a target, which finds the types; add one")
    if not named:
        return is_best
    if args.src is not None:
        raise InputError(f"{args.type}: {named[0]} finds the types; leave TYPE out")
    args.type, args.src = None, args.type
    return True


def run(args: argparse.Namespace) -> int:
    compensation.take_source(args)
    for name in ("pure", "leave_output_tensor", "output_tensor_type", "token_embedding_type"):
        if getattr(args, name):
            raise InputError(
                f"--{name.replace('_', '-')}: the mix decides every type; leave it out, or edit a "
                "recipe"
            )
    if args.tensor_type or args.imatrix:
        raise InputError(
            "--tensor-type and --imatrix: the mix decides every type from statistics; leave them "
            "out, or edit a recipe"
        )
    if args.type:
        return _best(args)
    return _mix(args)


def _best(args: argparse.Namespace) -> int:
    match = _BEST.fullmatch(args.type)
    assert match is not None, "asked"
    if args.stats or args.dry_run or args.method != "ggml" or args.distill:
        raise InputError(
            f"{args.type}: it calibrates and chooses the method by itself; leave --stats, "
            "--method, --distill and --dry-run out"
        )
    from dsq.convert.atomic import check_target
    from dsq.convert.checkpoint import open_checkpoint
    from dsq.runtime.fidelity.best import Options, best
    from dsq.runtime.fidelity.mix import Budget

    source = common.local_model(args.src, args)
    out = args.output or common.output_path(source, args.type)
    check_target(out, force=args.force)
    _defaults(args)
    ids, about = windows(args, source)
    report = best(
        source,
        out,
        ids,
        Budget("bpw", float(match[1])),
        Options(args.threads, args.seed, args.device or "auto", about["name"]),
        force=args.force,
        pre=args.pre,
        tell=(lambda line: None) if args.json else (lambda line: print(line, flush=True)),
    )
    _save(args, report.recipe, out)
    if args.json:
        content = {"output": str(out), "text": about["name"], **report.to_json()}
        common.print_json({**content, "recipe": report.recipe.to_json()})
        return 0
    first, last = report.steps[0], min(report.steps, key=lambda step: step.kld)
    spec = open_checkpoint(out).spec
    print(
        f"{out}: {last.bpw:.2f} bpw, {common.human(out.stat().st_size)}; mean KLD on held-out "
        f"text {last.kld:.6f}, {last.kld / first.kld:.2f} × {first.name} ({first.bpw:.2f} bpw); "
        f"RoPE {spec.rope.kind}"
    )
    return 0


def _defaults(args: argparse.Namespace) -> None:
    args.ctx, args.tokens = args.ctx or 512, args.tokens or 128 << 10
    args.seed, args.parse_special = args.seed or 0, False


def _mix(args: argparse.Namespace) -> int:
    from dsq.cli.quantize import write
    from dsq.convert.checkpoint import open_checkpoint
    from dsq.quant.mix import read_recipe
    from dsq.runtime.fidelity.mix import choose_recipe, measure_table, plan_recipe

    recipe = read_recipe(args.recipe) if args.recipe else None  # before any I/O
    source = common.local_model(args.src, args)
    checkpoint = open_checkpoint(source)
    with _statistics(args, checkpoint) as stats:
        table = None
        if recipe is None:
            budget = _budget(args, checkpoint)
            assert stats is not None, "a target needs statistics"
            table = measure_table(checkpoint, stats, n_threads=args.threads)
            recipe, _ = choose_recipe(table, budget)
        plan = plan_recipe(
            checkpoint,
            recipe,
            str(args.recipe or "the mix"),
            imatrix=_imatrix(args, stats) if stats else None,
            allow_requantize=args.allow_requantize,
            split_max_bytes=args.split_max_size,
            pre=args.pre,
        )
        out = args.output or common.output_path(source, f"{plan.bpw:.2f}bpw")
        if args.dry_run and table is not None and not args.json:
            _print_curve(table)
        if not args.dry_run or args.save_recipe:
            _save(args, recipe, out)
        found = None
        if compensation.is_asked_for(args):
            if stats is None:
                raise InputError(
                    "--method compensated, --distill: give --stats FILE, or --calibrate with --text"
                )
            found = compensation.Calibration.of_stats(stats)
        return write(args, checkpoint, plan, found, out, {"recipe": recipe.to_json()})


def _imatrix(args: argparse.Namespace, stats: Stats) -> Imatrix:
    """Its path goes into the file's metadata: without that of a folder of this run alone."""
    from dsq.convert.imatrix import sums_of_stats

    found = sums_of_stats(stats).means()
    return replace(found, path=Path(stats.path.name)) if args.calibrate else found


@contextmanager
def _statistics(
    args: argparse.Namespace, checkpoint: HfCheckpoint | GgufCheckpoint
) -> Iterator[Stats | None]:
    """Those of --stats, or gathered now; None for a recipe without them."""
    from dsq.quant.stats import read_stats

    if args.stats and args.calibrate:
        raise InputError("--stats, --calibrate: give one of them")
    if args.stats:
        yield read_stats(args.stats)
        return
    if not args.calibrate:
        if args.recipe:
            yield None
            return
        raise InputError(
            "a mix is found by measuring: give --stats FILE (of dsq calibrate --hessians "
            "--gradients), or --calibrate with --text FILE…"
        )
    from dsq.runtime.calibration.calibrate import Options, calibrate

    n_ctx = args.ctx
    if args.vram is not None:
        args.ctx = None  # the context to serve, not a calibration window
    _defaults(args)
    ids, about = windows(args, checkpoint.path)
    args.ctx = n_ctx
    with tempfile.TemporaryDirectory(prefix=".dsq-stats-", dir=Path()) as folder:
        path = Path(folder) / "stats.safetensors"
        options = Options(
            hessians=True,
            gradients=True,
            seed=args.seed,
            device=args.device or "auto",
            n_threads=args.threads,
        )
        calibrate(checkpoint.path, path, ids, about_text=about, options=options)
        yield read_stats(path)


def _budget(args: argparse.Namespace, checkpoint: HfCheckpoint | GgufCheckpoint) -> Budget:
    from dsq.convert.inspect import memory_at
    from dsq.runtime.fidelity.mix import Budget

    if args.target_bpw is not None:
        return Budget("bpw", args.target_bpw)
    if args.target_kld is not None:
        return Budget("kld", args.target_kld)
    header = header_bytes(checkpoint)
    if args.target_size is not None:
        return Budget("bytes", args.target_size - header)
    n_ctx = args.ctx or checkpoint.spec.n_ctx
    memory = memory_at(checkpoint.spec, 0, n_ctx)
    left = args.vram - memory.total
    if left <= 0:
        raise InputError(
            f"--vram {common.human(args.vram)}: the KV cache and buffers of {n_ctx} tokens alone "
            f"take {common.human(memory.total)}; use a smaller --ctx"
        )
    return Budget("bytes", left)


def header_bytes(checkpoint: HfCheckpoint | GgufCheckpoint) -> int:
    """About what metadata and tokenizer take in the file."""
    from dsq.convert.pipeline import plan_gguf
    from dsq.quant.presets import PRESETS

    plan = plan_gguf(checkpoint, PRESETS["q8_0"], allow_requantize=True)
    total = 0
    for entry in plan.layout.entries:
        value = entry.value
        if isinstance(value, str):
            total += len(value.encode())
        elif hasattr(value, "__len__"):
            total += sum(8 + len(v.encode()) if isinstance(v, str) else 4 for v in value)
        total += 40
    return total + 96 * len(plan.layout.tensors)


def _save(args: argparse.Namespace, recipe: Recipe, out: Path) -> None:
    """The recipe, beside the file unless --save-recipe names a place."""
    from dsq.convert.atomic import check_target, write_text

    path = args.save_recipe or out.with_suffix(".recipe.json")
    check_target(path, force=args.force or args.save_recipe is None)
    write_text(path, json.dumps(recipe.to_json(), indent=1) + "\n")


def _print_curve(table: Table) -> None:
    """Every choice of every matrix, and the predicted curve."""
    from dsq.quant import mix

    names = list(dict.fromkeys(c.type.name for row in table.choices.values() for c in row))
    print("predicted divergence of the output, 1e-6 nats a token")
    print(f"{'':<26}" + "".join(f"{name:>9}" for name in names))
    for tensor, row in table.choices.items():
        cells = {c.type.name: f"{1e6 * c.kld:9.1f}" for c in row}
        print(
            f"{tensor.removesuffix('.weight'):<26}"
            + "".join(cells.get(name, f"{'–':>9}") for name in names)
        )
    print("\nthe best mix at each size: bits a weight of these matrices, predicted KLD")
    weights = sum(a * b for a, b in table.shapes.values())
    for point in mix.curve(table.choices):
        print(f"{8 * point.n_bytes / weights:8.3f}  {point.kld:.6f}")
    print()
