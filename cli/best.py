"""`dsq quantize best-4.5`, `--target-bpw`, `--recipe`: types found by measuring."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from importlib.metadata import version
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
    from dsq.runtime.calibration.workdir import WorkDir
    from dsq.runtime.fidelity.mix import Budget, Table

_TARGETS = ("target_bpw", "target_size", "target_kld", "vram")
# What else the bytes depend on, with the calibration and the text.
_SETTINGS = (
    *("ctx", "method", "damp", "distill", "split_max_size", "pre"),
    *("allow_requantize", "allow_nonfinite"),
)
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
    if args.distill and args.split_max_size:
        raise InputError("--distill: writes one file; leave --split-max-size out")
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
    from dsq.convert.checkpoint import open_checkpoint
    from dsq.runtime.fidelity.best import Options, best
    from dsq.runtime.fidelity.mix import Budget

    source = common.local_model(args.src, args)
    out = args.output or common.output_path(source, args.type)
    _check_outputs(args, out)
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
        keep=lambda recipe: _save(args, recipe, out),
        tell=(lambda line: None) if args.json else (lambda line: print(line, flush=True)),
    )
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


def _check_outputs(args: argparse.Namespace, out: Path) -> None:
    """Before hours of work. What the same run had written when it was killed is in no way."""
    from dsq.convert.atomic import check_target
    from dsq.runtime.calibration.workdir import WorkDir

    check_target(out, force=args.force or WorkDir.owns(out))
    if args.save_recipe:
        check_target(args.save_recipe, force=args.force or WorkDir.is_left(out))


def _defaults(args: argparse.Namespace) -> None:
    args.ctx, args.tokens = args.ctx or 512, args.tokens or 128 << 10
    args.seed, args.parse_special = args.seed or 0, False


def _mix(args: argparse.Namespace) -> int:
    from dsq.convert.checkpoint import open_checkpoint
    from dsq.quant.mix import read_recipe
    from dsq.quant.stats import read_stats

    recipe = read_recipe(args.recipe) if args.recipe else None  # before any I/O
    if args.stats and args.calibrate:
        raise InputError("--stats, --calibrate: give one of them")
    if recipe is None and not (args.stats or args.calibrate):
        raise InputError(
            "a mix is found by measuring: give --stats FILE (of dsq calibrate --hessians "
            "--gradients), or --calibrate with --text FILE…"
        )
    checkpoint = open_checkpoint(common.local_model(args.src, args))
    if args.calibrate:
        return _calibrate_and_mix(args, checkpoint, recipe)
    return _write(args, checkpoint, recipe, read_stats(args.stats) if args.stats else None)


def _calibrate_and_mix(
    args: argparse.Namespace, checkpoint: HfCheckpoint | GgufCheckpoint, recipe: Recipe | None
) -> int:
    """All in `OUT.partial`: a run that was killed goes on where it was, to the same bytes."""
    from dsq.quant.stats import read_stats
    from dsq.quant.threads import default_threads
    from dsq.runtime.calibration.calibrate import Options, calibrate
    from dsq.runtime.calibration.workdir import WorkDir, settings_hash
    from dsq.runtime.decoder import chosen_device
    from dsq.runtime.fidelity.mix import check_budget, check_recipe
    from dsq.runtime.fidelity.source_check import check_not_source, source_identity
    from dsq.runtime.torch_setup import need_torch

    need_torch("--calibrate")
    if recipe is None:
        check_budget(checkpoint, _budget(args, checkpoint))
    else:
        check_recipe(checkpoint, recipe, str(args.recipe))
    # Without -o the file is called by the bits it comes to have, which nobody knows yet.
    out = args.output or common.output_path(checkpoint.path, _target(args))
    if not args.dry_run:
        _check_outputs(args, out)
        check_not_source(checkpoint, out)
    n_ctx = args.ctx
    if args.vram is not None:
        args.ctx = None  # the context to serve, not a calibration window
    _defaults(args)
    ids, about = windows(args, checkpoint.path)
    args.ctx = n_ctx
    options = Options(
        hessians=True,
        gradients=True,
        seed=args.seed,
        device=chosen_device(args.device or "auto"),
        n_threads=args.threads or default_threads(),
    )
    settings = settings_hash(
        source_identity(checkpoint),
        (options, recipe and recipe.to_json(), about["name"]),
        [getattr(args, name) for name in (*_TARGETS, *_SETTINGS)],
        [version(name) for name in ("dsq", "torch")],
        ids,
    )
    with WorkDir(out, settings) as work:
        path = work.path / "stats.safetensors"

        def gather() -> None:
            calibrate(checkpoint.path, path, ids, about_text=about, options=options, force=True)

        work.once("stats", gather)
        return _write(args, checkpoint, recipe, read_stats(path), work)


def _target(args: argparse.Namespace) -> str:
    """`target-bpw-4.5`, `recipe-name`"""
    if args.recipe:
        return f"recipe-{args.recipe.stem}"
    name = next(name for name in _TARGETS if getattr(args, name) is not None)
    return f"{name.replace('_', '-')}-{getattr(args, name)}"


def _write(
    args: argparse.Namespace,
    checkpoint: HfCheckpoint | GgufCheckpoint,
    recipe: Recipe | None,
    stats: Stats | None,
    work: WorkDir | None = None,
) -> int:
    """Choose the types if there is no recipe, and write the file; in `work`, step by step."""
    from dsq.cli.quantize import write
    from dsq.runtime.fidelity.mix import choose_recipe, chosen_once, measure_table, plan_recipe

    if recipe is None:
        budget = _budget(args, checkpoint)
        assert stats is not None, "a target needs statistics"

        def choose() -> tuple[Recipe, float]:
            table = measure_table(
                checkpoint, stats, damp=compensation.damp_of(args), n_threads=args.threads
            )
            if args.dry_run and not args.json:
                _print_curve(table)
            return choose_recipe(table, budget)

        # Of a dry run the table is to be seen.
        recipe, _ = choose() if work is None or args.dry_run else chosen_once(work, choose)
    plan = plan_recipe(
        checkpoint,
        recipe,
        str(args.recipe or "the mix"),
        imatrix=_imatrix(args, stats) if stats else None,
        allow_requantize=args.allow_requantize,
        split_max_bytes=args.split_max_size,
        pre=args.pre,
    )
    out = args.output or common.output_path(checkpoint.path, f"{plan.bpw:.2f}bpw")
    if not args.dry_run or args.save_recipe:
        _save(args, recipe, out)
    found = None
    if compensation.is_asked_for(args):
        if stats is None:
            raise InputError(
                "--method compensated, --distill: give --stats FILE, or --calibrate with --text"
            )
        found = compensation.Calibration.of_stats(stats)
    return write(args, checkpoint, plan, found, out, {"recipe": recipe.to_json()}, work)


def _imatrix(args: argparse.Namespace, stats: Stats) -> Imatrix:
    """Its path goes into the file's metadata: without that of a folder of this run alone."""
    from dsq.convert.imatrix import sums_of_stats

    found = sums_of_stats(stats).means()
    return replace(found, path=Path(stats.path.name)) if args.calibrate else found


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
    from dsq.convert.atomic import DiskError, check_target, write_text

    path = args.save_recipe or out.with_suffix(".recipe.json")
    text = json.dumps(recipe.to_json(), indent=1) + "\n"
    if path.is_file() and path.read_bytes() == text.encode():
        return  # of the run that this one goes on with
    try:
        check_target(path, force=args.force or args.save_recipe is None)
    except InputError as error:  # it came while we worked: what is done is kept
        raise DiskError(str(error)) from error
    write_text(path, text)


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
