"""`dsq quantize --method compensated` and `--distill`: their options, and the calibration named."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dsq.cli import common, corpus
from dsq.cli.calibrate import count, windows
from dsq.cli.progress import progress_bar
from dsq.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
    from dsq.convert.imatrix import Imatrix
    from dsq.convert.pipeline import GgufPlan, Progress
    from dsq.quant.stats import Stats


_OURS = ("stats", "calibrate", "damp", "device")
_TEXT = (
    *("text", "repo", "mix", "english", "chinese", "fim_rate", "strict"),
    *("tokens", "ctx", "seed"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "error feedback", "the same types and size with less error, by calibration (needs torch)"
    )
    group.add_argument("--method", choices=("ggml", "compensated"), default="ggml")
    group.add_argument("--stats", type=Path, metavar="FILE", help="of dsq calibrate")
    group.add_argument("--calibrate", action="store_true", help="on the text below, at once")
    group.add_argument("--tokens", type=count, metavar="N", help="at most (default 64k)")
    group.add_argument("--ctx", type=common.positive, metavar="N", help="a window (default 512)")
    group.add_argument("--seed", type=int, help="draws windows (default 0)")
    group.add_argument("--damp", type=damp, metavar="D", help="of the Hessians (default 0.1)")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"))
    group.add_argument(
        "--distill",
        type=count,
        metavar="N",
        help="tune scales and norm gains on N of the tokens, until the file predicts as SRC does",
    )
    corpus.add_arguments(parser)


def damp(text: str) -> float:
    """argparse type: a share of a Hessian's mean diagonal."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 to 100")
    return value


def damp_of(args: argparse.Namespace) -> float | None:
    """That of the method; None where no error is fed back."""
    from dsq.quant.solver import DAMP

    if args.method != "compensated":
        return None
    return DAMP if args.damp is None else float(args.damp)


def check(args: argparse.Namespace) -> None:
    """Refuse what does not go together, and find a SRC that --text has swallowed."""
    take_source(args)
    given = [name for name in (*_OURS, *_TEXT) if _is_given(getattr(args, name))]
    if not is_asked_for(args):
        if given:
            raise InputError(
                f"{_flags(given)}: only with --method compensated or --distill N; add that"
            )
        return
    what = "--distill" if args.method == "ggml" else "--method compensated"
    if args.method == "ggml" and args.damp is not None:
        raise InputError("--damp: only with --method compensated; add that")
    if bool(args.stats) == args.calibrate:
        raise InputError(
            f"{what}: give either --stats FILE (of dsq calibrate), or --calibrate "
            "with --text FILE…, --repo DIR… or --mix code"
        )
    if args.distill and args.split_max_size:
        raise InputError("--distill: writes one file; leave --split-max-size out")
    if args.imatrix and (args.stats or args.method != "ggml"):
        raise InputError("--imatrix: the statistics hold the importance matrix; leave it out")
    unused = [name for name in given if name in _TEXT]
    if args.stats and unused:
        raise InputError(f"{_flags(unused)}: --stats holds its tokens; leave it out")


def take_source(args: argparse.Namespace) -> None:
    """`--text a.txt model.gguf`: such an option takes all it can get, SRC as well."""
    args.model = args.src
    corpus.take_model(args)
    args.src = args.model


def is_asked_for(args: argparse.Namespace) -> bool:
    return args.method == "compensated" or args.distill is not None


def method(args: argparse.Namespace) -> str:
    """What a file's metadata call it."""
    steps = [args.method] if args.method != "ggml" else []
    return "+".join([*steps, *(["distilled"] if args.distill else [])])


def _is_given(value: Any) -> bool:
    return value is not None and value is not False


def _flags(names: list[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Windows of tokens (windows, n_ctx), the name of their text, and the importance matrix that
    the plan is made with."""

    ids: npt.NDArray[np.int32]
    text: str
    imatrix: Imatrix

    @classmethod
    def of_stats(cls, stats: Stats) -> Calibration:
        from dsq.convert.imatrix import sums_of_stats

        imatrix = sums_of_stats(stats).means()
        return cls(stats.tokens, imatrix.datasets[0], imatrix)


def calibration(args: argparse.Namespace, checkpoint: HfCheckpoint | GgufCheckpoint) -> Calibration:
    """What the options name: the tokens that statistics were made of, or those of a text.

    A text's importance matrix is not computed, as nothing would read it: it has the right names and
    sizes, so that the types are those that llama-quantize chooses with one, and leaves no trace in
    the file's metadata (`with_method`). Raises InputError for
    statistics of another model, and for a text too short.
    """
    from dsq.convert.identity import model_identity
    from dsq.convert.imatrix import Imatrix
    from dsq.quant.stats import input_of, input_sizes, output_sizes, read_stats

    model = model_identity(checkpoint)
    if args.stats:
        stats = read_stats(args.stats)
        stats.check_model(model)
        return Calibration.of_stats(stats)
    import numpy as np

    args.ctx, args.tokens = args.ctx or 512, args.tokens or 64 << 10
    args.seed, args.parse_special = args.seed or 0, False
    ids, about = windows(args, checkpoint.path)
    sizes = input_sizes(model)
    names = [name for name in output_sizes(model) if name != "output.weight"]
    values = {name: np.ones(sizes[input_of(name)], np.float32) for name in names}
    text = about["name"]
    return Calibration(ids, text, Imatrix(Path(text), values, (text,), len(ids)))


def quantized(
    args: argparse.Namespace,
    checkpoint: HfCheckpoint | GgufCheckpoint,
    plan: GgufPlan,
    found: Calibration,
    out: Path,
    *,
    force: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Carry the plan out with error feedback; what the report says of it."""
    from dsq.runtime.fidelity.compensate import Options, quantize

    given = damp_of(args)
    assert given is not None, "--method compensated"
    options = Options(given, n_threads=args.threads, device=args.device or "auto")
    start = time.perf_counter()
    report = quantize(
        checkpoint,
        plan,
        found.ids,
        out,
        options,
        force=force,
        allow_nonfinite=args.allow_nonfinite,
        progress=progress,
    )
    return {
        "files": [str(path) for path in report.paths],
        "size_bytes": report.size_bytes,
        "seconds": round(time.perf_counter() - start, 3),
        "compensation": report.to_json(),
    }


class Quantize(Protocol):
    """Writes the file as it is before distillation; what the report says of it."""

    def __call__(self, out: Path, *, force: bool) -> dict[str, Any]: ...


def with_distillation(
    args: argparse.Namespace,
    checkpoint: HfCheckpoint | GgufCheckpoint,
    plan: GgufPlan,
    found: Calibration,
    out: Path,
    quantize: Quantize,
    *,
    force: bool,
) -> dict[str, Any]:
    """Quantize, then distill, each done once in `OUT.partial`; what the report says of both."""
    from importlib.metadata import version

    from dsq.convert.atomic import check_space
    from dsq.convert.pipeline import check_outputs
    from dsq.runtime.calibration.workdir import WorkDir, settings_hash
    from dsq.runtime.fidelity import distill
    from dsq.runtime.fidelity.source_check import source_identity

    check_outputs(checkpoint, plan, out, force=force or WorkDir.owns(out))
    settings = settings_hash(
        source_identity(checkpoint),
        [(step.name, step.to.name) for step in plan.steps],
        [(e.key, e.value) for e in plan.layout.entries if isinstance(e.value, (str, int, float))],
        [getattr(args, name) for name in ("distill", "damp", "device", "seed", "threads")],
        version("dsq"),
        found.ids,
    )
    distill.split(_windows(args, found), distill.Options())  # refuses too few, before hours of work
    with WorkDir(out, settings) as work:
        if not work.done:
            check_space(out, 2 * plan.layout.data_bytes)
        before, after = work.path / "quantized.gguf", work.path / "distilled.gguf"
        report: dict[str, Any] = work.once("quantized", lambda: quantize(before, force=True))
        report["distillation"] = work.once(
            "distilled", lambda: _distilled(args, checkpoint.path, before, found, after)
        )
        work.finish(after.name, out, force=force)
    return {**report, "files": [str(out)]}


def _distilled(
    args: argparse.Namespace, source: Path, before: Path, found: Calibration, after: Path
) -> dict[str, Any]:
    from dsq.runtime.fidelity.distill import Options, distill

    device = "cpu" if args.device in (None, "auto") else args.device
    options = Options(seed=args.seed or 0, n_threads=args.threads, device=device)
    with progress_bar("distilling", 1000, quiet=args.json) as advance:
        shown = 0

        def tell(what: str, done: int, total: int, ratio: float) -> None:
            nonlocal shown
            now = int(500 * ((what == "distilling") + done / total))
            advance(max(0, now - shown))
            shown = max(now, shown)

        windows = _windows(args, found)
        report = distill(source, before, after, windows, options, force=True, progress=tell)
    return report.to_json()


def _windows(args: argparse.Namespace, found: Calibration) -> npt.NDArray[np.int32]:
    """What is distilled on."""
    return found.ids[: max(4, args.distill // found.ids.shape[1])]


def tell_distilled(report: dict[str, Any]) -> None:
    """One line on what it brought."""
    ratio = report["kld_after"] / report["kld_before"] if report["kld_before"] else 1.0
    if report["best_step"] == 0:
        print("distilled: no gain on the held-out windows; the file is as it was before")
        return
    print(
        f"distilled on {report['n_train_tokens']:,} tokens in {report['steps']} steps: "
        f"mean KLD {report['kld_after']:.6f}, {ratio:.2f} of what it was, on "
        f"{report['n_held_out_tokens']:,} tokens held out"
    )


def tell(report: dict[str, Any]) -> None:
    """One line on how it went, and a warning for what was not wholly done."""
    tensors = report["tensors"]
    errors = [t["error"] for t in tensors if t["error"] is not None]
    left = {t["type"] for t in tensors if t["error"] is None}
    if left:
        common.warn(
            f"{len(tensors) - len(errors)} tensors of {', '.join(sorted(left))} were rounded by "
            "ggml: these types' grids allow no error feedback (earlier errors are made up for)"
        )
    parts = [f"damp {', '.join(f'{d:g}' for d in sorted({t['damp'] for t in tensors}))}"]
    if errors:
        parts.append(f"{sum(errors) / len(errors):.2f} of plain rounding's layer error")
    if report["resumed_layers"]:
        parts.append(f"went on after {report['resumed_layers']} layers")
    dead = sum(t["dead_channels"] for t in tensors)
    parts += [f"{dead} dead channels"] if dead else []
    print(f"{len(tensors)} tensors compensated on {report['tokens']:,} tokens: {', '.join(parts)}")
