"""What `--to gptq` and `--to exl2` share: the text that they are calibrated on, damp and device."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsq.cli import common, corpus
from dsq.cli.calibrate import count
from dsq.cli.calibrate import windows as windows_of_text
from dsq.cli.compensation import damp
from dsq.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint

_TEXT = ("text", "repo", "mix", "english", "chinese", "fim_rate", "strict", "tokens", "ctx")
OPTIONS = ("stats", *_TEXT, "damp", "device")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("GPTQ and EXL2", "need torch, and text to calibrate on")
    group.add_argument("--stats", type=Path, metavar="FILE", help="of dsq calibrate: its tokens")
    group.add_argument("--tokens", type=count, metavar="N", help="at most (default 64k)")
    group.add_argument("--ctx", type=common.positive, metavar="N", help="a window (default 512)")
    group.add_argument("--damp", type=damp, metavar="D", help="of the Hessians (default 0.1)")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"))
    corpus.add_arguments(parser)


@dataclass(frozen=True, eq=False)
class Windows:
    """Token ids (windows, n_ctx), and the record of what they are from (`name`, …)."""

    ids: npt.NDArray[np.int32]
    about: dict[str, Any]


def windows(args: argparse.Namespace, checkpoint: HfCheckpoint | GgufCheckpoint) -> Windows:
    """What the options name. Raises InputError for none, for statistics of another model and for
    a text too short."""
    given = [name for name in _TEXT if is_given(getattr(args, name))]
    if args.stats:
        if given:
            raise InputError(f"{flags(given)}: --stats holds its tokens; leave it out")
        from dsq.convert.identity import model_identity
        from dsq.quant.stats import read_stats

        stats = read_stats(args.stats)
        stats.check_model(model_identity(checkpoint))
        return Windows(stats.tokens, {"name": args.stats.name})
    if not (args.text or args.repo or args.mix):
        raise InputError(
            f"--to {args.to} is calibrated on text: give --text FILE…, --repo DIR… or --mix code, "
            "or --stats FILE of dsq calibrate"
        )
    settings = argparse.Namespace(**vars(args))
    settings.ctx, settings.tokens = args.ctx or 512, args.tokens or 64 << 10
    ids, about = windows_of_text(settings, checkpoint.path)
    return Windows(ids, about)


def is_given(value: Any) -> bool:
    return value is not None and value is not False


def flags(names: list[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def refuse(args: argparse.Namespace, names: tuple[str, ...], to: str) -> None:
    """Raise InputError for options that are only for `--to` another format."""
    given = [name for name in names if is_given(getattr(args, name))]
    if given:
        raise InputError(f"{flags(given)}: only with --to {to}")
