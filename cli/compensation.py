"""`dsq quantize --method compensated`: its options, and the calibration that they name."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsq.cli import common, corpus
from dsq.cli.calibrate import count, windows
from dsq.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
    from dsq.convert.imatrix import Imatrix
    from dsq.convert.pipeline import GgufPlan
    from dsq.runtime.compensate import Compensation


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


def check(args: argparse.Namespace) -> None:
    """Refuse what does not go together, and find a SRC that --text has swallowed."""
    args.model = args.src
    corpus.take_model(args)
    args.src = args.model
    given = [name for name in (*_OURS, *_TEXT) if _is_given(getattr(args, name))]
    if args.method == "ggml":
        if given:
            raise InputError(f"{_flags(given)}: only with --method compensated; add that")
        return
    if bool(args.stats) == args.calibrate:
        raise InputError(
            "--method compensated: give either --stats FILE (of dsq calibrate), or --calibrate "
            "with --text FILE…, --repo DIR… or --mix code"
        )
    if args.imatrix:
        raise InputError("--imatrix: the statistics hold the importance matrix; leave it out")
    unused = [name for name in given if name in _TEXT]
    if args.stats and unused:
        raise InputError(f"{_flags(unused)}: --stats holds its tokens; leave it out")


def _is_given(value: Any) -> bool:
    return value is not None and value is not False


def _flags(names: list[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Windows of tokens (windows, n_ctx), and the importance matrix that the plan is made with."""

    ids: npt.NDArray[np.int32]
    imatrix: Imatrix


def calibration(args: argparse.Namespace, checkpoint: HfCheckpoint | GgufCheckpoint) -> Calibration:
    """What the options name: the tokens that statistics were made of, or those of a text.

    A text's importance matrix is not computed, as nothing would read it: it has the right names and
    sizes, so that the types are those that llama-quantize chooses with one. Raises InputError for
    statistics of another model, and for a text too short.
    """
    from dsq.convert.identity import model_identity
    from dsq.convert.imatrix import Imatrix, sums_of_stats
    from dsq.quant.stats import input_of, input_sizes, output_sizes, read_stats

    model = model_identity(checkpoint)
    if args.stats:
        stats = read_stats(args.stats)
        stats.check_model(model)
        return Calibration(stats.tokens, sums_of_stats(stats).means())
    import numpy as np

    args.ctx, args.tokens = args.ctx or 512, args.tokens or 64 << 10
    args.seed, args.parse_special = args.seed or 0, False
    ids, about = windows(args, checkpoint.path)
    sizes = input_sizes(model)
    names = [name for name in output_sizes(model) if name != "output.weight"]
    values = {name: np.ones(sizes[input_of(name)], np.float32) for name in names}
    text = about["name"]
    return Calibration(ids, Imatrix(Path(text), values, (text,), len(ids)))


@contextmanager
def opened(
    args: argparse.Namespace,
    checkpoint: HfCheckpoint | GgufCheckpoint,
    plan: GgufPlan,
    found: Calibration | None,
    out: Path,
) -> Iterator[Compensation | None]:
    """What makes the plan's tensors from `found`; None without it."""
    if found is None:
        yield None
        return
    from dsq.runtime.compensate import Options, opened

    options = Options(n_threads=args.threads, device=args.device or "auto")
    if args.damp is not None:
        options = replace(options, damp=args.damp)
    with opened(checkpoint, plan.steps, found.ids, out, options) as made:
        yield made


def to_json(found: Calibration, made: Compensation) -> dict[str, Any]:
    return {
        "tokens": int(found.ids.size),
        "seconds": round(made.seconds, 3),
        "tensors": [r.to_json() for r in made.reports],
    }


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
    dead = sum(t["dead_channels"] for t in tensors)
    parts += [f"{dead} dead channels"] if dead else []
    print(f"{len(tensors)} tensors compensated on {report['tokens']:,} tokens: {', '.join(parts)}")
